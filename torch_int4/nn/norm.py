"""The norm after the last layer in one operator call, where the stock one takes seven over a tensor of one row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_int4.layouts.layer import BlockLayout
from torch_int4.ops.calls import call
from torch_int4.support.mixins import Mixin


class FusedNorm(Mixin):
    """Mixed into norms of the class that a family's layers have; its data is their layout."""

    torch_int4_data: BlockLayout

    def forward(self, x: Tensor) -> Tensor:
        """`[..., features]` to the same."""
        layout = self.torch_int4_data
        weight: Any = self._parameters.get("weight")  # type: ignore[attr-defined]
        plain = type(x) is Tensor and weight is not None and x.dtype is weight.dtype and x.is_cpu and weight.is_cpu
        plain = plain and x.dtype is not torch.float64
        learns = plain and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if not plain or learns or torch.compiler.is_compiling():
            return super().forward(x)  # type: ignore[misc]
        output: Tensor = call(
            torch.ops.torch_int4.normalize.default,
            x,
            weight,
            self._parameters.get("bias"),  # type: ignore[attr-defined]
            norm=layout.norm,
            eps=getattr(self, layout.eps),
            norm_offset=layout.norm_offset,
        )
        return output

    def extra_repr(self) -> Any:
        """The text that `print(model)` adds."""
        return f"{super().extra_repr()}, by torch_int4"  # type: ignore[misc]
