"""Tasks of lm-eval on local files: the harness's own definitions, with the data set replaced.

One YAML file here is one task. Its name is the task's; ``include`` is lm-eval's own YAML below ``lm_eval/tasks``,
``data`` gives the file of each split below the folder that the user names, and ``scores`` the metrics that a gate looks
at. Prompts, answers and metrics come from lm-eval, so figures compare with those published.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from torch_int4.errors import Int4Error

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
PAPER = ("lambada_openai", "hellaswag", "winogrande", "piqa", "wikitext")  # the table of arXiv 2311.00502


@dataclass(frozen=True)
class LocalTask:
    """One file of this folder.

    Attributes:
        name: lm-eval's name of the task.
        include: its YAML, below ``lm_eval/tasks``.
        data: split (``validation`` or ``test``) to the file below the data folder.
        scores: metrics that decide.
    """

    name: str
    include: str
    data: dict[str, str]
    scores: tuple[str, ...]

    def config(self, folder: Path) -> dict[str, Any]:
        """The task as lm-eval reads it, with the data files of `folder`.

        Raises:
            Int4Error: a file is missing, or its first line is no JSON object.
        """
        files = {split: folder / file for split, file in self.data.items()}
        for file in files.values():
            _check(file, self.name)
        absent = {key: None for key in SPLITS[:3] if key.removesuffix("_split") not in files}
        return {
            "include": str(harness_folder() / self.include),
            "task": self.name,
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
            **absent,
        }


def available() -> dict[str, LocalTask]:
    """Every task of this folder by name."""
    files = sorted(Path(__file__).parent.glob("*.yaml"))
    return {file.stem: _read(file) for file in files}


def write(names: Iterable[str], data: str | Path, target: str | Path) -> list[str]:
    """Writes tasks on the files of `data` into the folder `target`, for lm-eval's ``--include_path``.

    Args:
        names: names of tasks; lm-eval's tasks of the same names are hidden by them.
        data: folder of JSON lines, one subfolder a data set.

    Returns:
        The names.

    Raises:
        Int4Error: there is no such task here, or a data file is missing or unreadable.
    """
    known, written = available(), []
    for name in names:
        if name not in known:
            raise Int4Error(f"task {name!r} has no local data; there are {', '.join(known)}; others need the hub")
        config = known[name].config(Path(data).expanduser().resolve())
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        (Path(target) / f"{name}.yaml").write_text(text, encoding="utf-8")
        written.append(name)
    return written


def present(data: str | Path) -> list[str]:
    """Names of the tasks whose files are all in `data`."""
    folder = Path(data).expanduser()
    return [name for name, task in available().items() if all((folder / file).is_file() for file in task.data.values())]


def accuracies(data: str | Path) -> list[str]:
    """The tasks of `present` whose deciding metrics are accuracies.

    Raises:
        Int4Error: there are none in `data`.
    """
    known = available()
    found = [name for name in present(data) if not any("perplexity" in metric for metric in known[name].scores)]
    if not found:
        raise Int4Error(f"--data {str(data)!r}: holds no files of {', '.join(known)}")
    return found


def harness_folder() -> Path:
    """lm-eval's folder of tasks.

    Raises:
        Int4Error: lm-eval is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise Int4Error('lm-eval is not installed; run: pip install "torch-int4[eval]"')
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


def _read(file: Path) -> LocalTask:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return LocalTask(file.stem, content["include"], dict(content["data"]), tuple(content["scores"]))


def _check(file: Path, task: str) -> None:
    """Says what is wrong with a file before `datasets` does, many frames deep."""
    try:
        with file.open(encoding="utf-8") as lines:
            first = json.loads(lines.readline())
    except OSError as error:
        raise Int4Error(f"task {task}: {file}: {error.strerror}; --data names the folder that holds it") from error
    except ValueError as error:
        raise Int4Error(f"task {task}: {file}: line 1 is not JSON ({error}); one document a line is needed") from error
    if not isinstance(first, dict):
        raise Int4Error(f"task {task}: {file}: line 1 is a {type(first).__name__}; each line must be a JSON object")
