"""An embedding that takes half the bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bf16Embedding(nn.Embedding):
    """An embedding that stores bf16 and returns the model's dtype.

    The table is a buffer, not a parameter: `model.dtype` is the dtype of the first float parameter, and has
    to remain the dtype that the model computes in. `model.to(dtype)` changes what is returned, not what is
    stored.
    """

    out_dtype: torch.dtype

    @classmethod
    def from_embedding(cls, old: nn.Embedding) -> Bf16Embedding:
        """An embedding `[vocabulary, features]` of any float dtype, rounded to bf16; its dtype is what this returns."""
        new = cls(
            old.num_embeddings,
            old.embedding_dim,
            padding_idx=old.padding_idx,
            max_norm=old.max_norm,
            norm_type=old.norm_type,
            device="meta",
        )
        del new.weight
        new.register_buffer("weight", old.weight.detach().to(torch.bfloat16))
        new.out_dtype = old.weight.dtype
        return new.train(old.training)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids of any shape to `[..., features]` in `out_dtype`."""
        rows = F.embedding(input, self.weight, self.padding_idx, self.max_norm, self.norm_type)
        return rows.to(self.out_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # nn.Module.to(dtype) comes through here: let it set the dtype of the output, keep the table in bf16.
        self.out_dtype = fn(torch.empty(0, dtype=self.out_dtype, device=self.weight.device)).dtype
        return super()._apply(lambda t: fn(t).to(torch.bfloat16) if t.is_floating_point() else fn(t), recurse)
