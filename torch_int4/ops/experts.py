"""The operators of the experts of sparse layers: shapes for `torch.compile`, and gradients.

`experts`, and `prepared_experts` of experts that `prepare_experts` has checked. docs/reference/operators.md has the
arguments, shapes and errors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.ops.fakes import fake


@fake("experts")
def _experts(x: Tensor, out_features: list[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features[-1]))


@fake("prepared_experts")
def _prepared_experts(x: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _no_gradient(ctx: Any, *grads: Any) -> None:
    raise Int4Error("operators of experts are for inference; call the modules where gradients are needed")


for _name in ("experts", "prepared_experts"):
    torch.library.register_autograd(f"torch_int4::{_name}", _no_gradient)
