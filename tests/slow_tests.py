"""The tests that `make test-fast` leaves out: the functions that took longest, of all that a run has measured.

Every run notes the seconds of each test function, its parameters together, in pytest's cache. `--write-slow` chooses by
all notes: the quickest functions stay as long as they take SECONDS together, the others go to `tests/slow_tests.txt`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

SECONDS = 140.0  # starting and collecting take some twenty more
LIST = Path(__file__).with_suffix(".txt").resolve()
NOTES = "torch_int4/seconds"


def function_of(node: str) -> str:
    """The name of a test without its parameters."""
    return node.partition("[")[0]


def choose(seconds: dict[str, float], limit: float) -> list[str]:
    """The functions that are left out so that the others take no longer than the limit."""
    slow, total = [], 0.0
    for name, taken in sorted(seconds.items(), key=lambda item: (item[1], item[0])):
        total += taken
        if total > limit:
            slow.append(name)
    return sorted(slow)


class SlowTests:
    """The plugin: marks what the list names, notes times, writes the list where it is asked to."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.slow = set(LIST.read_text().split("\n")) if LIST.exists() else set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Before `-m` takes its choice: pytest's own hook runs last."""
        for item in items:
            if function_of(item.nodeid) in self.slow:
                item.add_marker(pytest.mark.slow)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called after setup, call and teardown of each test."""
        self.seconds[function_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Functions of which only a part ran keep the longer time of an earlier run."""
        cache: Any = getattr(session.config, "cache", None)
        if cache is None or hasattr(session.config, "workerinput"):  # one of several processes: the first one notes all
            return
        known = cache.get(NOTES, {})
        known |= {name: round(max(taken, known.get(name, 0.0)), 3) for name, taken in self.seconds.items()}
        cache.set(NOTES, known)
        if session.config.getoption("--write-slow"):
            root = LIST.parents[1]  # renamed files are no longer there
            there = {name: taken for name, taken in known.items() if (root / name.partition("::")[0]).exists()}
            LIST.write_text("\n".join(choose(there, SECONDS)) + "\n")
