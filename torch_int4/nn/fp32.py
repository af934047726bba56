"""Int4 linears of models in half precision that keep some of their linears in fp32."""

from __future__ import annotations

from torch import Tensor

from torch_int4.nn.linear import Int4Linear


class Fp32Linear(Int4Linear):
    """An `Int4Linear` whose input, products and output are in fp32, whatever it is given."""

    def forward_alone(self, x: Tensor) -> Tensor:
        """`[..., out_features]` in float32, or in float64 where x is."""
        return super().forward_alone(x.float() if x.itemsize < 4 else x)
