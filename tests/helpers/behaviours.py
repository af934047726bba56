"""Ways of generating, rows of the table in docs/guides/generation.md: a test says what to expect, and is held to it."""

import dataclasses
import functools
import inspect

import pytest
from decoders import Calls
from generating import NAMES, shared

FUSED, STOCK, REFUSED = "yes", "stock", "no"
START, END = "<!-- table -->", "<!-- end of table -->"


@dataclasses.dataclass(frozen=True)
class Row:
    """What a way of generating does for each model, where it is tested, and why it is not "yes" everywhere."""

    title: str
    test: str
    outcomes: dict
    why: str


ROWS = []


def behaviour(title, outcome=FUSED, *, refused=None, why="", counted=True):
    """Makes a test of `test(patched, reference, ...)` for every model, and a row of the table.

    The test compares the patched model with the float one that holds the same weights. Our attention operator must run
    in it where the outcome is FUSED, and must not where it is STOCK.

    Args:
        title: of the row.
        outcome: FUSED or STOCK.
        refused: names of models, with the exception that the float one raises, and so must the patched one.
        why: a remark for the table.
        counted: False for tests that see for themselves what runs, for compiled code hides it here.
    """
    refused = refused or {}
    outcomes = {name: REFUSED if name in refused else outcome for name in NAMES}

    def decorate(test):
        inner = inspect.signature(test).parameters

        @functools.wraps(test)
        def run(name, **parameters):
            patched, reference = shared(name)
            if name in refused:
                for model in (reference, patched):
                    with pytest.raises(refused[name]):
                        test(model, model, **parameters)
                return
            if not counted:
                test(patched, reference, **parameters)
                return
            with Calls() as calls:
                test(patched, reference, **parameters)
            assert (calls.attended > 0) == (outcome == FUSED)

        own = [p for p in inner.values() if p.name not in ("patched", "reference")]
        name = inspect.Parameter("name", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        run.__signature__ = inspect.Signature([name, *own])
        ROWS.append(Row(title, f"{test.__module__}.{test.__name__}", outcomes, why))
        return pytest.mark.parametrize("name", NAMES)(run)

    return decorate


def table():
    """The rows as Markdown."""
    head = ["behaviour", *NAMES, "remark"]
    lines = [head, ["---"] * len(head)]
    rows = sorted(ROWS, key=lambda row: row.test.split(".")[0])  # in any order of import
    lines += [[row.title, *(row.outcomes[name] for name in NAMES), row.why] for row in rows]
    return "\n".join("| " + " | ".join(cells).rstrip() + " |" for cells in lines)
