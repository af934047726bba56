"""Int4 linears that compute something besides the product with their weight.

They run as modules of their own: operators that fuse several linears, or whole layers, take `Int4Linear` alone, and
leave layers with an extended linear to the modules inside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from torch_int4.nn.linear import Int4Linear
from torch_int4.weights.result import Extra

ROWS = 1024  # of the unit matrix that go through the extras at a time


class ExtendedLinear(Int4Linear):
    """An `Int4Linear` with extras; `extend` makes one of a plain linear.

    Attributes:
        extras: `Extra` modules by name, in alphabetical order, in which they take x. Their tensors are in the state
            dict, under `extras.<name>.<tensor>`.
    """

    extras: nn.ModuleDict

    def forward_alone(self, x: Tensor) -> Tensor:
        """`[..., out_features]` in the dtype of x."""
        return self._through_extras(x, super().forward_alone)

    def _through_extras(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        entered = []
        for extra in self._parts():
            entered.append((extra, x))
            x = extra.enter(x)
        y = product(x)
        for extra, given in reversed(entered):
            y = extra.leave(given, y)
        return y

    def _parts(self) -> list[Extra]:
        return list(self.extras.values())  # type: ignore[arg-type]

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix that the linear stands for, extras included, `[out_features, in_features]`."""
        weight = super().dequantize()
        columns = []
        for rows in torch.eye(self.in_features).split(ROWS):
            columns.append(self._through_extras(rows, lambda x: x @ weight.t()))
        return torch.cat(columns).t().to(dtype).contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight and of the extras, without the bias."""
        return super().nbytes + sum(extra.nbytes for extra in self._parts())


def extend(linear: Int4Linear, extras: Mapping[str, Extra]) -> None:
    """Give a linear extras, in place, besides those that it has; nothing happens where there are none.

    Raises:
        Int4Error: an extra does not fit the linear.
        ValueError: the linear has one of that name, or shares its input with others.
    """
    if not extras:
        return
    if linear._shared is not None:
        raise ValueError("a linear that shares its input with others cannot be extended")
    for name, extra in extras.items():
        extra.check(linear.out_features, linear.in_features, f"extras.{name}")
    known = extras_of(linear)
    both = known.keys() & extras.keys()
    if both:
        raise ValueError(f"the linear has extras {sorted(both)} already")
    modules = {name: extra.train(linear.training) for name, extra in sorted({**known, **extras}.items())}
    linear.__class__ = ExtendedLinear
    linear.extras = nn.ModuleDict(modules)


def extras_of(module: nn.Module) -> dict[str, Extra]:
    """The extras of a linear by name; none of any other module."""
    return dict(module.extras.items()) if isinstance(module, ExtendedLinear) else {}  # type: ignore[arg-type]
