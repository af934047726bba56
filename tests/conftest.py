"""Fixtures: every kernel set that runs here is discovered, none is listed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from torch_int4 import ops


@pytest.fixture(params=ops.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one kernel set for a test, and checks that it is the one in use."""
    ops.set_isa(request.param)
    assert ops.isa() == request.param
    yield request.param
    ops.set_isa("")
