"""Every decoder type that the installed transformers has is patched, and held to the float model of the same weights.

Types are discovered; `odd_types.py` has the fields of configs that tiny models need. docs/models.md shows outcomes.
"""

import os
from pathlib import Path

import pytest
import torch
import transformers
from odd_types import NOT_BUILT
from outcomes import decoder_types, outcome, table

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "<!-- table -->", "<!-- end of table -->"
VERSION = ".".join(transformers.__version__.split(".")[:2])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models are so small that threads would spend their time in waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.oldest
@pytest.mark.parametrize("model_type", decoder_types())
def test_a_patched_model_is_what_its_weights_say(model_type):
    """Logits, greedy search with and without a cache, left padding, saving and loading."""
    found = outcome(model_type)
    if model_type in NOT_BUILT:
        pytest.skip(found.remarks[0])


def test_the_page_says_what_was_measured():
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    writes = os.environ.get("TORCH_INT4_WRITE_DOCS")
    if f"transformers {VERSION}" not in before and not writes:
        pytest.skip(f"{PAGE.name} is of another transformers than {VERSION}")
    wanted = f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}"
    if writes:
        PAGE.write_text(wanted, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == wanted, "run with TORCH_INT4_WRITE_DOCS=1"
