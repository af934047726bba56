"""A model as the stages see it that work on the whole of it, before its linears are rounded and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4.weights.result import Extra


def _no_data(batch: int) -> Tensor:
    raise IndexError(f"batch {batch} of a recipe that runs without data")


@dataclass
class Model:
    """One model, in eval mode.

    Attributes:
        module: the model. `prepare` gets it in float; `after` with int4 linears in their places, and nothing fused.
        linears: bits of the linears that are to be quantized, or have been, by name. Those of modules that `prepare`
            replaces are looked for anew.
        run: `run(batch)` computes the logits `[windows, T, vocabulary]` for one batch of the calibration data.
        batches: how many batches there are; 0 where the recipe runs without data.
        extend: `extend(name, extras)` gives an int4 linear extras; for `after` alone.
        generator: source of all random choices of stages.
        notes: whatever a stage wants to remember between `prepare` and `after`, under its own name.
        notices: what a stage could not do, for the report.
    """

    module: nn.Module
    linears: dict[str, int]
    run: Callable[[int], Tensor] = _no_data
    batches: int = 0
    extend: Callable[[str, Mapping[str, Extra]], None] | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    notes: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
