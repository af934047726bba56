"""Waiting for a module to be imported by somebody else."""

import importlib
import importlib.util
import sys

import pytest

from torch_int4.support.after_import import after_import


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that can be imported, and what has been seen of it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    (tmp_path / "waited_for.py").write_text("import pathlib\nvalue = 1\n")
    yield "waited_for"
    sys.modules.pop("waited_for", None)


def test_actions_run_once_the_module_has_run(module):
    seen = []

    def first(found):
        seen.append(("first", found.value))

    def second(found):
        seen.append(("second", found.value))

    before = list(sys.meta_path)
    for action in (first, second, first):
        after_import(module, action)
    assert importlib.util.find_spec(module).name == module  # looking is not importing
    assert not seen
    imported = importlib.import_module(module)
    assert sorted(seen) == [("first", 1), ("second", 1)]
    assert sys.meta_path == before
    assert type(imported.__loader__).__name__ == "SourceFileLoader"
    assert imported.__spec__.loader is imported.__loader__
    after_import(module, first)
    assert len(seen) == 3
    importlib.reload(imported)
    assert len(seen) == 3


def test_modules_that_fail_or_do_not_exist_are_waited_for(module, tmp_path):
    seen = []
    (tmp_path / "waited_for.py").write_text("raise ValueError('broken')\n")
    after_import(module, seen.append)
    with pytest.raises(ValueError, match="broken"):
        importlib.import_module(module)
    (tmp_path / "waited_for.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(module)
    (tmp_path / "waited_for.py").write_text("value = 22\n")
    importlib.invalidate_caches()
    assert importlib.import_module(module).value == 22
    assert [found.__name__ for found in seen] == [module]
