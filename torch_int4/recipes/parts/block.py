"""The unit that recipes work on: the linears of one block of a model, their inputs, and scales to fold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_int4.recipes.parts.folds import Fold, is_transposed

ENERGY = 100.0  # times the median of its batch: the most that a row counts
FIRST = 0.1  # what the first rows of all windows count together, relative to all other rows


def row_factors(x: Tensor) -> Tensor:
    """Factors `[..., 1]` that balance the rows of activations x `[rows, K]` or `[windows, T, K]`.

    Models put what attention finds no better use for on the first token, an attention sink (arXiv 2309.17453), which
    all tokens read. In some layers its row has 10⁵ times the energy of others, and nothing else would count in a sum of
    squares; in others it is one ordinary row of a thousand, in a direction of its own, and least squares gives it up.
    """
    energy = x.square().sum(-1, keepdim=True)
    factors = (ENERGY * energy.median() / energy).sqrt_().clamp_(max=1.0).nan_to_num_(1.0)
    if x.dim() > 2 and x.shape[-2] > 1:
        rest = (energy * factors.square())[..., 1:, :].sum()
        first = (FIRST * rest / energy[..., 0, :].sum()).sqrt_()
        factors[..., 0, :] = first.nan_to_num_(1.0, posinf=1.0)
    return factors


class Inputs:
    """Statistics of one input, which several linears may share.

    Attributes:
        gram: fp32 `[K, K]`, the sum of x xᵀ over all rows x, which `row_factors` has balanced.
        rows: how many rows there were.
        abs_sum: fp32 `[K]`, the sum of |x|.
        abs_max: fp32 `[K]`, the largest |x|.
    """

    def __init__(self, features: int) -> None:
        self.gram = torch.zeros(features, features)
        self.abs_sum, self.abs_max = torch.zeros(features), torch.zeros(features)
        self.rows = 0
        self.cache: dict[object, object] = {}  # what stages derive from the Gram matrix, shared by the linears

    def add(self, x: Tensor) -> None:
        """Count the rows of x `[rows, K]`, or `[windows, T, K]`, windows that begin where a text does."""
        x = x.detach().float()
        if x.numel() == 0:
            return
        balanced = (x * row_factors(x)).reshape(-1, x.shape[-1])
        self.gram.addmm_(balanced.t(), balanced)
        x = x.reshape(-1, x.shape[-1])
        magnitude = x.abs()
        self.abs_sum += magnitude.sum(0)
        torch.maximum(self.abs_max, magnitude.amax(0), out=self.abs_max)
        self.rows += x.shape[0]
        self.cache.clear()

    @property
    def mean_abs(self) -> Tensor:
        """The mean of |x|, `[K]`."""
        return self.abs_sum / max(self.rows, 1)

    def divide(self, s: Tensor) -> None:
        """Account for the input being divided by s `[K]`."""
        self.gram /= torch.outer(s, s)
        self.abs_sum /= s
        self.abs_max /= s
        self.cache.clear()

    def error(self, difference: Tensor) -> Tensor:
        """Sum over rows x of (difference · x)², per output: `[N]` for a change of weights `[N, K]`."""
        return ((difference @ self.gram) * difference).sum(1)


@dataclass
class Linear:
    """A linear of a block that is to be quantized.

    Attributes:
        name: its full name, for messages and results.
        path: its name within the block.
        module: the float module, an `nn.Linear` or a Conv1D.
        bits: 4 or 8.
        inputs: statistics of its input; None where the recipe needs none.
    """

    name: str
    path: str
    module: nn.Module
    bits: int = 4
    inputs: Inputs | None = None

    @property
    def weight(self) -> Tensor:
        """The weight `[N, K]`, detached; a view of the module's."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().t() if is_transposed(self.module) else weight.detach()

    @property
    def key(self) -> str:
        """The name of its weight among the block's parameters."""
        return f"{self.path}.weight"

    def in_own_layout(self, weight: Tensor) -> Tensor:
        """A weight `[N, K]` as the module keeps it."""
        return weight.t() if is_transposed(self.module) else weight


@dataclass
class Block:
    """One block (decoder layer) in fp32.

    Attributes:
        name: its full name.
        module: the block.
        linears: what is to be quantized, in the order in which they run.
        folds: scales that may be moved, checked on data.
        run: `run(batch, parameters)` computes the block's output for one batch of captured inputs (from the quantized
            blocks before it), with some parameters, by their names in the block, replaced.
        targets: `targets(batch)`, the output that the float model has there.
        batches: how many batches there are.
        generator: source of all random choices of stages.
        notices: what a stage could not do, for the report.
    """

    name: str
    module: nn.Module
    linears: list[Linear]
    folds: list[Fold] = field(default_factory=list)
    run: Callable[[int, dict[str, Tensor]], Tensor] = lambda batch, parameters: torch.empty(0)
    targets: Callable[[int], Tensor] = lambda batch: torch.empty(0)
    batches: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator)
    notices: list[str] = field(default_factory=list)

    def linear_of(self, module: nn.Module) -> Linear | None:
        """The entry of a module, if it is to be quantized."""
        return next((linear for linear in self.linears if linear.module is module), None)

    def fold(self, fold: Fold, s: Tensor) -> None:
        """Move scales s `[channels]`, and account for it in the statistics of the targets' inputs."""
        fold.apply(s)
        wide, seen = fold.expand(s), set()
        for target in fold.targets:
            linear = self.linear_of(target)
            if linear is not None and linear.inputs is not None and id(linear.inputs) not in seen:
                seen.add(id(linear.inputs))
                linear.inputs.divide(wide)

    def path_of(self, module: nn.Module) -> str:
        """The name of a module within the block."""
        return next(name for name, found in self.module.named_modules() if found is module)
