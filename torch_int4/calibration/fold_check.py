"""A check of a family's facts about scales in a block: random scales that cancel must not change its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_int4.recipes.parts.block import Block
from torch_int4.recipes.parts.folds import Fold

TOLERANCE = 1e-3  # relative change of a block's output by scales that cancel


@torch.no_grad()
def checked(known: Sequence[Fold], block: Block, run: Callable[[], Tensor], recipe: str) -> list[Fold]:
    """The folds to use: of those that hold, the first one of each source and of each target.

    Args:
        known: the facts that fit by name and shape.
        block: gets notices of facts that do not hold, and of linears that are left without scales.
        run: the block's output on some data, with its parameters as they are.
        recipe: for the notices.
    """
    want = run()
    kept: list[Fold] = []
    refused: list[Fold] = []
    for fold in known:
        if any(fold.source is other.source or _overlap(fold, other) for other in kept):
            continue
        (kept if _holds(fold, run, want) else refused).append(fold)
    for fold in refused:
        if not any(_overlap(fold, other) for other in kept):
            source, *targets = (name[len(block.name) + 1 :] for name in fold.names)
            block.notices.append(
                f"{recipe}: scales of {', '.join(targets)} cannot be folded into {source}: "
                "that would change what the block computes"
            )
    free = [linear.path for linear in block.linears if not any(linear.module in fold.targets for fold in kept)]
    if free:
        block.notices.append(f"{recipe}: no scales are folded for {', '.join(free)}")
    return kept


def _overlap(a: Fold, b: Fold) -> bool:
    return any(target is other for target in a.targets for other in b.targets)


def _holds(fold: Fold, run: Callable[[], Tensor], want: Tensor) -> bool:
    """Whether a fold keeps the output; for norms that add 1 to their weight, with the offset set."""
    before = [(parameter, parameter.data) for parameter in fold.tensors()]
    s = torch.rand(fold.channels, generator=torch.Generator().manual_seed(1)) * 1.5 + 0.5
    weight = fold.source._parameters.get("weight")
    is_norm = weight is not None and weight.dim() == 1
    for offset in (0.0, 1.0) if is_norm else (0.0,):
        fold.offset = offset
        fold.apply(s)
        got = run()
        for parameter, data in before:
            parameter.data = data
        if (got - want).norm() <= TOLERANCE * want.norm():
            return True
    return False
