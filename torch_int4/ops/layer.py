"""The operators of decoder layers: shapes for `torch.compile`, and gradients.

`normalize`, `norm_linears`, `linear_add`, `mlp`, `decoder_layer`, and the operators of prepared layers, which have no
shapes because no graph takes them. docs/reference/operators.md has the arguments, shapes and errors of all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.ops.fakes import fake


@fake("normalize")
@fake("decoder_layer")
def _alike(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@fake("norm_linears")
def _norm_linears(x: Tensor, out_features: list[int], out_dtype: torch.dtype | None) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], rows), dtype=out_dtype or x.dtype) for rows in out_features]


@fake("linear_add")
def _linear_add(x: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@fake("mlp")
def _mlp(x: Tensor, out_features: list[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features[-1]))


def _no_gradient(ctx: Any, *grads: Any) -> None:
    raise Int4Error("operators of whole blocks are for inference; call the modules where gradients are needed")


# decoder_layer writes into its arguments, so PyTorch takes no formula for it.
for _name in ("normalize", "norm_linears", "linear_add", "mlp"):
    torch.library.register_autograd(f"torch_int4::{_name}", _no_gradient)
