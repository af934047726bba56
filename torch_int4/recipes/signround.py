"""SignRound: signed gradient descent on how each weight is rounded and where each group is clipped.

From arXiv 2309.05516: w' = s * clip(round(w / s + v) - z), with v between -½ and ½ for every weight, and the ends of a
group's range multiplied by trained factors. A block's output is compared with the float model's; each step moves every
parameter by the learning rate against the sign of its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_int4.config import WeightOptions
from torch_int4.recipes.parts.block import Block
from torch_int4.recipes.parts.train import Schedule, fake_quants, rounded, train
from torch_int4.weights.canonical import Int4Weight

FLOAT_TARGETS = True
PRESETS = {  # rates of v and of the factors
    "light": Schedule(50, (0.02, 0.01)),
    "default": Schedule(200, (1 / 200, 1 / 200)),
    "best": Schedule(1000, (1 / 1000, 1 / 1000)),
}


class SignSGD(torch.optim.Optimizer):
    """p -= lr * sign(gradient)."""

    def __init__(self, params: Sequence[Tensor], lr: float = 0.005) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step for all parameters that have a gradient; NaN counts as none."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign().nan_to_num_(0.0), alpha=group["lr"])


def round(block: Block, options: WeightOptions) -> dict[str, Int4Weight]:
    """Train the rounding of a block's 4-bit linears, and return their weights by name."""
    quants = fake_quants(block, options, shift=True)
    shifts = [quant.shift for quant in quants if quant.shift is not None]
    factors = [factor for quant in quants for factor in (quant.low, quant.high)]

    def ends(i: int) -> tuple[Tensor, Tensor]:
        return quants[i].low, quants[i].high

    @torch.no_grad()
    def clamp() -> None:
        for shift in shifts:
            shift.clamp_(-0.5, 0.5)
        for factor in factors:
            factor.clamp_(0.0, 1.0)

    if quants and block.batches:
        train(block, (shifts, factors), lambda: rounded(quants, {}, ends), PRESETS[options.preset], SignSGD, clamp)
    return {q.linear.name: q.freeze(q.linear.weight.float(), q.low, q.high) for q in quants}
