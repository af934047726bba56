"""The parameters of a patched model that are in float: how many, of which modules, and what they take."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import nn

from torch_int4.nn.linear import Int4Linear

SHARE = 0.01  # of all weights; modules with less are told together


class Floats(NamedTuple):
    """The float parameters of all modules of one class."""

    kind: str
    parameters: int
    nbytes: int


def count_floats(model: nn.Module) -> list[Floats]:
    """The float parameters of a model by the classes of the modules that hold them, the most bytes first.

    A parameter of several modules counts once, for the first of them. Those of int4 linears (their biases) do not.
    """
    seen: set[int] = set()
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen or not parameter.is_floating_point():
                continue
            seen.add(id(parameter))
            if not isinstance(module, Int4Linear):
                counts[type(module).__name__] += parameter.numel()
                sizes[type(module).__name__] += parameter.numel() * parameter.element_size()
    return [Floats(kind, counts[kind], nbytes) for kind, nbytes in sizes.most_common()]


def told(floats: list[Floats], weights: int) -> str:
    """One line about them, for a model with so many weights in int4 or int8; "" without any."""
    total = sum(entry.parameters for entry in floats)
    if not total:
        return ""
    least = SHARE * (total + weights)
    named = [f"{entry.kind} {entry.parameters / 1e6:.1f} M" for entry in floats if entry.parameters >= least]
    rest = sum(entry.parameters for entry in floats if entry.parameters < least)
    if rest:
        named.append(f"{'others' if named else 'norms and other small ones'} {rest / 1e6:.2f} M")
    nbytes = sum(entry.nbytes for entry in floats)
    return f"in float: {total / 1e6:.1f} M parameters, {nbytes / 1e6:.1f} MB: {', '.join(named)}"
