"""Scales that move between a module and the linears that read its output: the facts of `ScaleFold`, found in a model.

If a norm or a linear writes y and linears read it, y / s and W * s give the same product for any s > 0. Recipes
choose s; what may be scaled with what is a fact about a family of models, and is checked on data before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_int4.layouts.scales import ScaleFold


@dataclass
class Fold:
    """A fact that was found in a model.

    Attributes:
        source: the module whose output is divided.
        targets: the linears, of which column k is multiplied by `expand(s)[k]`.
        rows: channels of the source's output that are scaled, or None for all.
        channels: number of scales.
        repeat: (size of a head, query heads per kv head), or None.
        offset: what the norm adds to its weight before it multiplies (1 for some RMS norms).
        names: (source, targets...) for messages.
    """

    source: nn.Module
    targets: list[nn.Module]
    channels: int
    rows: Tensor | None = None
    repeat: tuple[int, int] | None = None
    offset: float = 0.0
    names: tuple[str, ...] = field(default=())

    def expand(self, s: Tensor) -> Tensor:
        """Scales of the source's channels `[channels]` as scales of the targets' inputs `[K]`."""
        if self.repeat is None:
            return s
        size, times = self.repeat
        return s.view(-1, size).repeat_interleave(times, dim=0).flatten()

    def reduce(self, values: Tensor, how: str = "amax") -> Tensor:
        """Statistics of the targets' inputs `[K]` as ones of the source's channels `[channels]`, by amax or mean."""
        if self.repeat is None:
            return values
        size, times = self.repeat
        return getattr(values.view(-1, times, size), how)(dim=1).flatten()

    def divisor(self, s: Tensor, outputs: int) -> Tensor:
        """The divisors of the source's rows, `[outputs]`: s, and 1 for rows that are not scaled."""
        if self.rows is None:
            return s
        return torch.ones(outputs, dtype=s.dtype).index_copy(0, self.rows, s)

    def source_tensors(self, s: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The source's weight and bias after folding s, which may require a gradient."""
        by_row = weight.dim() == 2 and not is_transposed(self.source)
        by = self.divisor(s, weight.shape[0 if by_row else -1])
        scaled = (weight + self.offset) / (by[:, None] if by_row else by)
        result = {"weight": scaled - self.offset if self.offset else scaled}
        if bias is not None:
            result["bias"] = bias / by
        return result

    def target_weight(self, target: nn.Module, weight: Tensor, s: Tensor) -> Tensor:
        """A target's weight, in its own layout, after folding s."""
        wide = self.expand(s)
        return weight * (wide[:, None] if is_transposed(target) else wide)

    @torch.no_grad()
    def apply(self, s: Tensor) -> None:
        """Fold s `[channels]`, positive, into the modules' parameters."""
        own = _parameter(self.source, "weight")
        assert own is not None
        for name, value in self.source_tensors(s, own, _parameter(self.source, "bias")).items():
            getattr(self.source, name).data = value.to(getattr(self.source, name).dtype)
        for target in self.targets:
            weight = target.weight
            assert isinstance(weight, Tensor)
            weight.data = self.target_weight(target, weight.data, s).to(weight.dtype)

    def tensors(self) -> list[nn.Parameter]:
        """All parameters that `apply` changes."""
        found = [self.source._parameters.get("weight"), self.source._parameters.get("bias")]
        found += [target._parameters.get("weight") for target in self.targets]
        return [parameter for parameter in found if parameter is not None]


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear keeps its weight as `[K, N]`, as transformers' Conv1D does."""
    return not isinstance(module, nn.Linear) and type(module).__name__ == "Conv1D"


def find(module: nn.Module, prefix: str, facts: Sequence[ScaleFold]) -> list[Fold]:
    """Every fact about `module` whose modules exist and whose shapes fit, in the order of the facts."""
    found = []
    for fact in facts:
        source = _descendant(module, fact.source)
        targets = [_descendant(module, name) for name in fact.targets]
        if source is None or any(target is None for target in targets):
            continue
        names = tuple(f"{prefix}.{name}" if prefix else name for name in (fact.source, *fact.targets))
        fold = _fit(fact, source, [t for t in targets if t is not None], _attribute(module, fact.head_dim), names)
        if fold is not None:
            found.append(fold)
    return found


def _fit(
    fact: ScaleFold, source: nn.Module, targets: list[nn.Module], head: int | None, names: tuple[str, ...]
) -> Fold | None:
    weight = _parameter(source, "weight")
    widths = {_inputs(target) for target in targets}
    if weight is None or len(widths) != 1 or None in widths:
        return None
    inputs = widths.pop()
    assert inputs is not None
    outputs = weight.shape[-1] if weight.dim() == 1 or is_transposed(source) else weight.shape[0]
    if fact.fused:
        if not head or (outputs - inputs) % (2 * head) or inputs % head or outputs <= inputs:
            return None
        kv = (outputs - inputs) // (2 * head)
        rows = torch.arange(outputs).view(kv, -1, head)[:, -1].flatten() if outputs % (kv * head) == 0 else None
        if rows is None or inputs % rows.numel():
            return None
        return Fold(source, targets, rows.numel(), rows, _repeat(head, inputs, rows.numel()), names=names)
    if outputs == inputs:
        return Fold(source, targets, inputs, names=names)
    if not head or outputs % head or inputs % outputs:
        return None
    return Fold(source, targets, outputs, None, _repeat(head, inputs, outputs), names=names)


def _repeat(head: int, inputs: int, channels: int) -> tuple[int, int] | None:
    return None if inputs == channels else (head, inputs // channels)


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    value = module._parameters.get(name)
    return None if value is None else value.data


def _inputs(linear: nn.Module) -> int | None:
    weight = _parameter(linear, "weight")
    if weight is None or weight.dim() != 2:
        return None
    return weight.shape[0 if is_transposed(linear) else 1]


def _descendant(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path.split("."):
        found = found._modules.get(name) if found is not None else None
    return found


def _attribute(module: nn.Module, path: str | None) -> int | None:
    if path is None:
        return None
    holder, _, name = path.rpartition(".")
    value = getattr(_descendant(module, holder) if holder else module, name, None)
    return value if isinstance(value, int) else None
