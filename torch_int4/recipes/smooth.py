"""SmoothQuant's scales: s = max|x|^½ / max|w|^½, folded into the module before.

From arXiv 2211.10438, with its usual exponent of a half. It evens out inputs with large features, which helps where
activations are rounded too (`compute="int8"`), and needs no search.
"""

from __future__ import annotations

from typing import Any

import torch

from torch_int4.config import WeightOptions
from torch_int4.recipes.awq import normalise
from torch_int4.recipes.parts.block import Block

NEEDS_INPUTS = True
ALONE: tuple[str, dict[str, Any]] = ("smooth+rtn", {})
EXPONENT = 0.5
LEAST = 1e-5  # of a range, relative to the largest: features that never occur keep a finite scale


def transform(block: Block, options: WeightOptions) -> None:
    """Fold the scales into every pair of modules that allows it."""
    for fold in block.folds:
        linears = [linear for target in fold.targets if (linear := block.linear_of(target)) is not None]
        inputs = next((linear.inputs for linear in linears if linear.inputs is not None), None)
        if inputs is None or inputs.rows == 0:
            continue
        largest = torch.stack([linear.weight.float().abs().amax(0) for linear in linears]).amax(0)
        x, w = fold.reduce(inputs.abs_max), fold.reduce(largest)
        if not bool(torch.isfinite(x).all()) or x.max() <= 0 or w.max() <= 0:
            continue
        x, w = x.clamp(min=LEAST * x.max().item()), w.clamp(min=LEAST * w.max().item())
        block.fold(fold, normalise(x**EXPONENT / w ** (1 - EXPONENT)))
