"""Training what rounds the weights of a block, so that the block's output stays close to the float model's.

Weights are rounded with straight-through gradients; parameters of rounding, clipping and scales are trained over the
captured batches, and the state with the least error is kept, which may be the one before training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_int4.config import WeightOptions
from torch_int4.recipes.parts.block import Block, Linear, row_factors
from torch_int4.recipes.parts.folds import Fold
from torch_int4.recipes.parts.grid import Grid, round_fp16
from torch_int4.recipes.rtn import pack_up
from torch_int4.weights.canonical import Int4Weight, group_spans

CHECKS = 4  # states that are compared with the first
CHECKED_BATCHES = 8


@dataclass(frozen=True)
class Schedule:
    """Steps of training, and the learning rate of each kind of parameter, falling linearly to zero."""

    steps: int
    rates: tuple[float, ...]


class FakeQuant:
    """Rounds a weight `[N, K]` on the grid of its groups, in a way that passes gradients on.

    Attributes:
        low, high: factors `[N, G]` of the ends of each group's range.
        shift: added to every weight before rounding, in steps, `[N, K]`; or None.
    """

    def __init__(self, linear: Linear, options: WeightOptions, *, shift: bool = False) -> None:
        self.linear, self.size = linear, options.group_size
        self.grid = Grid("symmetric" if options.symmetric else options.zeros)
        rows, inputs = linear.weight.shape
        groups = 1 if self.size == -1 else -(-inputs // self.size)
        self.low, self.high = torch.ones(rows, groups), torch.ones(rows, groups)
        self.shift = torch.zeros(rows, inputs) if shift else None

    def round(self, weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The weight after rounding, `[N, K]`, for factors `low` and `high` (which may be functions of parameters)."""
        parts = []
        for columns, groups, length in group_spans(weight.shape[1], self.size):
            w, shift, s, z = self._grids(weight, low, high, columns, groups, length)
            parts.append(_Rounded.apply(w, shift, s, z, self.grid).flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @torch.no_grad()
    def freeze(self, weight: Tensor, low: Tensor, high: Tensor) -> Int4Weight:
        """The canonical form of what `round` returns."""
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        scales = torch.empty_like(self.low)
        zeros = torch.empty_like(self.low)
        for columns, groups, length in group_spans(weight.shape[1], self.size):
            w, shift, s, z = self._grids(weight, low, high, columns, groups, length)
            q = _steps(w, shift, s, z, self.grid).clamp_(0, self.grid.levels - 1)
            codes[:, columns] = q.to(torch.uint8).flatten(1)
            scales[:, groups], zeros[:, groups] = s.squeeze(2), z.squeeze(2)
        return pack_up(codes, scales, zeros, self.grid, self.size, self.linear.name)

    def _grids(
        self, weight: Tensor, low: Tensor, high: Tensor, columns: slice, groups: slice, length: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Weights and shifts `[N, groups, length]`, scales and zeros `[N, groups, 1]`, all fp32."""
        w = weight[:, columns].unflatten(1, (-1, length))
        least, most = w.amin(2, keepdim=True), w.amax(2, keepdim=True)
        if self.grid.kind != "float":
            least, most = least.clamp(max=0), most.clamp(min=0)
        least, most = least * low[:, groups, None], most * high[:, groups, None]
        if self.grid.kind == "float":
            most = torch.maximum(least, most)
        shift = None if self.shift is None else self.shift[:, columns].unflatten(1, (-1, length))
        return w, shift, *self._fit(least, most)

    def _fit(self, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        if self.grid.kind == "symmetric":
            s = _straight_through(round_fp16, torch.where(-least >= most, least, most) / -8)
            return s, torch.full_like(s, 8.0)
        s = _straight_through(round_fp16, (most - least) / 15)
        if self.grid.kind == "float":
            return s, _straight_through(round_fp16, least)
        return s, _straight_through(torch.round, -least / torch.where(s == 0, 1.0, s)).clamp(0, 15)


class _Rounded(torch.autograd.Function):
    """The weights that codes stand for, with the gradients of codes that were not rounded.

    By hand, because these are most of what a step costs besides its products: a third of the passes over the weights
    that autograd would make.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, shift: Tensor | None, s: Tensor, z: Tensor, grid: Grid) -> Tensor:
        x = _steps(w, shift, s, z, grid)
        ctx.save_for_backward(w, s, z, x)
        ctx.grid = grid
        q = x.clamp(0, grid.levels - 1)
        return q.mul_(s).add_(z) if grid.kind == "float" else q.sub_(z).mul_(s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (w, s, z, x), floats, g = ctx.saved_tensors, ctx.grid.kind == "float", grads[0]
        q = x.clamp(0, ctx.grid.levels - 1)
        within = g.masked_fill((q != x).logical_or_(s == 0), 0.0)
        by_shift = within * s if ctx.needs_input_grad[1] else None
        by_scale = by_zero = None
        if ctx.needs_input_grad[2]:
            moved = (within * (w - z if floats else w)).sum(2, keepdim=True).div_(torch.where(s == 0, 1.0, s))
            by_scale = (q if floats else q.sub_(z)).mul_(g).sum(2, keepdim=True).sub_(moved)
        if ctx.needs_input_grad[3]:
            by_zero = (g - within).sum(2, keepdim=True)
            by_zero = by_zero if floats else by_zero.mul_(s).neg_()
        return within if ctx.needs_input_grad[0] else None, by_shift, by_scale, by_zero, None


def _steps(w: Tensor, shift: Tensor | None, s: Tensor, z: Tensor, grid: Grid) -> Tensor:
    """Weights in steps of the grid, rounded to whole ones, from code 0 on; a new tensor."""
    x = (w - z if grid.kind == "float" else w) / torch.where(s == 0, 1.0, s)
    if shift is not None:
        x.add_(shift)
    x.round_()
    return x if grid.kind == "float" else x.add_(z)


def _straight_through(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), with the gradient of x. The sum is exact: both terms are within a factor of two of each other."""
    return x + (function(x) - x).detach() if x.requires_grad else function(x)


def fake_quants(block: Block, options: WeightOptions, *, shift: bool = False) -> list[FakeQuant]:
    """One for every 4-bit linear of a block."""
    return [FakeQuant(linear, options, shift=shift) for linear in block.linears if linear.bits == 4]


def folded(block: Block, scales: Sequence[tuple[Fold, Tensor]]) -> dict[str, Tensor]:
    """The block's parameters, by name and in their own layout, that change when scales are folded one after another."""
    result: dict[str, Tensor] = {}

    def key(module: nn.Module, name: str) -> str:
        return f"{block.path_of(module)}.{name}"

    def current(module: nn.Module, name: str) -> Tensor | None:
        own = module._parameters.get(name)
        return None if own is None else result.get(key(module, name), own.detach())

    for fold, s in scales:
        weight = current(fold.source, "weight")
        assert weight is not None
        changed = fold.source_tensors(s, weight, current(fold.source, "bias"))
        result.update({key(fold.source, name): value for name, value in changed.items()})
        for target in fold.targets:
            weight = current(target, "weight")
            assert weight is not None
            result[key(target, "weight")] = fold.target_weight(target, weight, s)
    return result


def rounded(
    quants: Sequence[FakeQuant],
    parameters: dict[str, Tensor],
    factors: Callable[[int], tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """`parameters` with the weights of `quants` rounded; `factors(i)` gives the i-th one's low and high."""
    result = dict(parameters)
    for i, quant in enumerate(quants):
        linear = quant.linear
        own = parameters.get(linear.key)
        weight = linear.weight.float() if own is None else linear.in_own_layout(own)
        result[linear.key] = linear.in_own_layout(quant.round(weight, *factors(i)))
    return result


def train(
    block: Block,
    groups: Sequence[Sequence[Tensor]],
    parameters: Callable[[], dict[str, Tensor]],
    schedule: Schedule,
    optimizer: Callable[[Sequence[Tensor]], Any],
    clamp: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Train leaf tensors in place; afterwards they hold the best state that was seen.

    Args:
        groups: leaf tensors, one group per learning rate of the schedule.
        parameters: the block's parameters as functions of the leaves.
        optimizer: makes a `torch.optim.Optimizer` for one group.
        clamp: brings the leaves back into their ranges after each step.

    Returns:
        The mean squared error of the block's output (rows balanced) before, and that of the best state.
    """
    leaves = [leaf for group in groups for leaf in group]
    held = [p for p in block.module.parameters() if p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    checked = range(min(block.batches, CHECKED_BATCHES))
    every = max(1, schedule.steps // CHECKS)
    try:
        first = least = _error(block, parameters, checked)
        best = [leaf.detach().clone() for leaf in leaves]
        optimizers = [optimizer(group) for group in groups]
        for leaf in leaves:
            leaf.requires_grad_(True)
        for step in range(schedule.steps):
            _step(block, parameters, optimizers, schedule, step)
            clamp()
            if (step + 1) % every == 0 or step + 1 == schedule.steps:
                error = _error(block, parameters, checked)
                if error < least:
                    least, best = error, [leaf.detach().clone() for leaf in leaves]
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
    for leaf, value in zip(leaves, best, strict=True):
        leaf.requires_grad_(False).copy_(value)
    return first, least


def _step(
    block: Block,
    parameters: Callable[[], dict[str, Tensor]],
    optimizers: Sequence[Any],
    schedule: Schedule,
    step: int,
) -> None:
    batch = int(torch.randint(block.batches, (1,), generator=block.generator))
    with torch.enable_grad():
        loss = _distance(_output(block, batch, parameters()), block.targets(batch))
        loss.backward()
    for optimizer, rate in zip(optimizers, schedule.rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / schedule.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _output(block: Block, batch: int, parameters: dict[str, Tensor]) -> Tensor:
    """The block's output, with products in bf16 where the processor has instructions for them.

    They take less than half as long as fp32 ones and are off by 2⁻⁹, where 4 bits are off by 2⁻⁴. What is trained, the
    rounding and the states between blocks stay in fp32.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=_has_bf16()):
        return block.run(batch, parameters).float()


@functools.cache
def _has_bf16() -> bool:
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def _distance(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of rows that `row_factors` has balanced."""
    factors = row_factors(target)
    return F.mse_loss(output * factors, target * factors)


@torch.no_grad()
def _error(block: Block, parameters: Callable[[], dict[str, Tensor]], batches: range) -> float:
    now = parameters()
    errors = [_distance(_output(block, batch, now), block.targets(batch)).item() for batch in batches]
    mean = sum(errors) / len(errors)
    return mean if mean == mean else float("inf")
