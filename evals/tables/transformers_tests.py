"""Transformers' own generation tests, run on patched models and on stock ones.

    python evals/tables/transformers_tests.py FOLDER --families llama gemma2 > docs/measurements/transformers-tests.md

FOLDER is transformers' repository, with its folder `tests`; nothing is downloaded. Where it holds `src` as well, that
is the library under test, so that tests and library are of one version; else the installed one is. Every test that
`GenerationTesterMixin` gives to `tests/models/<family>/test_modeling_<family>.py` runs twice: as it is, and with every
model patched (weights rounded, all arithmetic and the KV cache in fp32) when the test calls its `eval()`. A test is
ours to explain if it fails patched and does not fail stock.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "gpt_neox", "falcon", "gptj", "qwen2", "gemma2", "mixtral")
MIXIN = "GenerationTesterMixin."
# Environment: the file in which this file, as a plugin of pytest, notes how many models it has patched; "" for none.
PATCH = "TORCH_INT4_PATCH_TESTS"
OPTIONS: dict[str, Any] = {"compute": "fp32", "kv_cache": "fp32"}


@dataclass
class Outcome:
    """The results of one run: how many tests passed, failed or were skipped, and why each failed."""

    counts: Counter[str] = field(default_factory=Counter)
    patched: int = 0  # models
    failures: dict[str, str] = field(default_factory=dict)
    trouble: str = ""  # why there are no results


def pytest_configure(config: Any) -> None:
    """A hook of pytest: has models patch themselves when a test makes them ready."""
    if notes := os.environ.get(PATCH):
        _patch_in_eval(Path(notes))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """A hook of pytest: keeps the tests of generation alone."""
    kept = [item for item in items if _is_of_generation(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _is_of_generation(item: Any) -> bool:
    function: Any = getattr(item.cls, getattr(item, "originalname", None) or item.name, None)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return getattr(function, "__qualname__", "").startswith(MIXIN)


def _patch_in_eval(notes: Path) -> None:
    from transformers import GenerationMixin, PreTrainedModel

    from torch_int4 import patch

    stock = PreTrainedModel.eval

    def evaluated(self: Any) -> Any:
        stock(self)
        if isinstance(self, GenerationMixin) and not hasattr(self, "torch_int4_report"):
            patch(self, **OPTIONS)
            with notes.open("a") as file:
                file.write(".")
        return self

    PreTrainedModel.eval = evaluated


def run(folder: Path, family: str, *, patched: bool, select: str | None, seconds: float) -> Outcome:
    """The outcome of the tests of a family, in a process of their own.

    Args:
        folder: with transformers' `tests`.
        family: name of a folder in `tests/models`.
        patched: whether models are.
        select: an expression for pytest's `-k`; by default all tests run.
        seconds: that the process may take.
    """
    file = folder / "tests" / "models" / family / f"test_modeling_{family}.py"
    if not file.is_file():
        return Outcome(trouble=f"{file} is missing")
    own = folder / "src"
    paths = [str(Path(__file__).parent), *([str(own)] if own.is_dir() else []), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as made:
        results, notes = Path(made) / "results.xml", Path(made) / "patched"
        environment[PATCH] = str(notes) if patched else ""
        command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider"]
        command += [f"--junitxml={results}", *(["-k", select] if select else [])]
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, timeout=seconds, capture_output=True, text=True, check=False
            )
        except subprocess.TimeoutExpired:
            return Outcome(trouble=f"took longer than {seconds:.0f} s")
        if not results.is_file():
            return Outcome(trouble=(done.stderr or done.stdout).strip().rpartition("\n")[2])
        outcome = read(results)
        outcome.patched = notes.stat().st_size if notes.is_file() else 0
        if patched and not outcome.patched:
            outcome.trouble = "no model was patched"
        return outcome


def read(results: Path) -> Outcome:
    """The outcome that a file in JUnit's form tells."""
    outcome = Outcome()
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        bad = next((part for kind in ("failure", "error") if (part := case.find(kind)) is not None), None)
        state = "failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"
        outcome.counts[state] += 1
        if bad is not None:
            outcome.failures[case.get("name", "")] = (bad.get("message") or "").strip().partition("\n")[0][:160]
    return outcome


def table(outcomes: dict[str, tuple[Outcome, Outcome]]) -> str:
    """Both outcomes of each family in Markdown, and a list of the tests that fail on patched models alone."""
    heads = ("family", "tests", "skipped", "models patched", "fail stock", "fail patched", "fail patched alone")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    ours: list[str] = []
    for family, (stock, patched) in outcomes.items():
        trouble = stock.trouble or patched.trouble
        if trouble:
            lines.append(f"| {family} | {trouble} |{' |' * (len(heads) - 2)}")
            continue
        alone = sorted(patched.failures.keys() - stock.failures.keys())
        ours += [f"- {family}: `{name}`: {patched.failures[name]}" for name in alone]
        counts = [stock.counts.total(), stock.counts["skipped"], patched.patched]
        counts += [len(stock.failures), len(patched.failures), len(alone)]
        lines.append(f"| {family} | {' | '.join(map(str, counts))} |")
    return "\n".join([*lines, "", *(ours or ["No test fails on patched models alone."])])


def main() -> int:
    """Print the table; returns 1 where something fails on patched models alone, or did not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="transformers' repository, or an unpacked archive of it")
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--select", help="an expression for pytest's -k")
    parser.add_argument("--seconds", type=float, default=1800.0, help="that the tests of one family may take")
    given = parser.parse_args()
    outcomes = {}
    for family in given.families:
        pair = [
            run(given.folder.resolve(), family, patched=patched, select=given.select, seconds=given.seconds)
            for patched in (False, True)
        ]
        outcomes[family] = (pair[0], pair[1])
        print(f"{family}: done", file=sys.stderr)
    print(table(outcomes))
    clean = all(
        not stock.trouble and not patched.trouble and patched.failures.keys() <= stock.failures.keys()
        for stock, patched in outcomes.values()
    )
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
