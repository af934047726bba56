"""docs/guides/generation.md says what the tests of generation hold models to."""

import importlib
import os
from pathlib import Path

from behaviours import END, FUSED, REFUSED, ROWS, START, table
from generating import NAMES

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "guides" / "generation.md"


def load_rows():
    """Imported here and not above, for pytest has to collect them first; that registers their rows."""
    for path in sorted(HERE.glob("test_generation*.py")):
        importlib.import_module(path.stem)


def test_the_page_has_the_table_that_the_tests_fill():
    load_rows()
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    after = rest.split(END)[1]
    wanted = f"{before}{START}\n{table()}\n{END}{after}"
    if os.environ.get("TORCH_INT4_WRITE_DOCS"):
        PAGE.write_text(wanted, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == wanted, "run with TORCH_INT4_WRITE_DOCS=1"


def test_every_row_is_a_test_of_its_own():
    load_rows()
    assert len({row.title for row in ROWS}) == len({row.test for row in ROWS}) == len(ROWS)
    for row in ROWS:
        module, name = row.test.rsplit(".", 1)
        assert callable(getattr(importlib.import_module(module), name))
        assert list(row.outcomes) == NAMES
        if REFUSED in row.outcomes.values():
            assert row.why
    assert sum(outcome == FUSED for row in ROWS for outcome in row.outcomes.values()) > len(ROWS) * len(NAMES) / 2
