"""Fixtures: every kernel set that runs here is discovered, none is listed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slow_tests import SlowTests

from torch_int4 import ops, recipes

TOYS = Path(__file__).parent / "helpers" / "stages"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option of the plugin."""
    parser.addoption("--write-slow", action="store_true", help="write tests/slow_tests.txt from the times of all runs")


def pytest_configure(config: pytest.Config) -> None:
    """Adds the plugin."""
    config.pluginmanager.register(SlowTests(), "slow_tests")


@pytest.fixture(params=ops.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one kernel set for a test, and checks that it is the one in use."""
    ops.set_isa(request.param)
    assert ops.isa() == request.param
    yield request.param
    ops.set_isa("")


@pytest.fixture
def toy_stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the files of helpers/stages stages of recipes, as if they lay in torch_int4/recipes."""
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(TOYS)])
    yield
    for name in (file.stem for file in TOYS.glob("*.py")):
        if sys.modules.pop(f"{recipes.__name__}.{name}", None) is not None:
            delattr(recipes, name)
    recipes.parse.cache_clear()
