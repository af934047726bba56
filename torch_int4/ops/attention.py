"""The operators `rotary_append` (RoPE, arXiv:2104.09864, into a KV cache) and `attention` (FlashAttention's online
softmax, arXiv:2205.14135): shapes for `torch.compile`, and gradients.

docs/reference/operators.md has their arguments, shapes and errors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.ops.fakes import fake


@fake("rotary_append")
def _rotary_append(query: Tensor) -> Tensor:
    return query.new_empty(query.shape)


@fake("attention")
def _attention(query: Tensor, value: Tensor) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _no_gradient(ctx: Any, *grads: Any) -> None:
    raise Int4Error("attention is for inference; use the model's own attention where gradients are needed")


# rotary_append writes into its arguments, so PyTorch takes no formula for it; gradients stop here before they reach it.
torch.library.register_autograd("torch_int4::attention", _no_gradient)
