"""Input embeddings in bf16, for models that compute in another dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Int4Config
from ..errors import Int4Error
from . import _hooks, _scan
from ._report import PatchReport
from ._scan import Target


class Bf16Embedding(nn.Embedding):
    """An embedding that stores bf16 and returns the model's dtype.

    The table is a buffer, not a parameter: `model.dtype` is the dtype of the first float parameter, and has
    to remain the dtype that the model computes in. `model.to(dtype)` changes what is returned, not what is
    stored.
    """

    out_dtype: torch.dtype

    @classmethod
    def from_embedding(cls, old: nn.Embedding) -> Bf16Embedding:
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
        rows = F.embedding(input, self.weight, self.padding_idx, self.max_norm, self.norm_type)
        return rows.to(self.out_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # nn.Module.to(dtype) comes through here: let it set the dtype of the output, keep the table in bf16.
        self.out_dtype = fn(torch.empty(0, dtype=self.out_dtype, device=self.weight.device)).dtype
        return super()._apply(lambda t: fn(t).to(torch.bfloat16) if t.is_floating_point() else fn(t), recurse)


def find(
    model: nn.Module, config: Int4Config, targets: list[Target]
) -> tuple[list[tuple[str, nn.Embedding, list[tuple[nn.Module, str]]]], list[tuple[str, str]]]:
    """Embeddings to store in bf16, with who holds them, and (name, reason) of those left alone."""
    if config.embeddings == "float":
        return [], []
    found: dict[nn.Embedding, tuple[str, list[tuple[nn.Module, str]]]] = {}
    for name, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if isinstance(child, nn.Embedding) and not isinstance(child, Bf16Embedding):
                path = f"{name}.{attribute}" if name else attribute
                found.setdefault(child, (path, []))[1].append((parent, attribute))
    going = {id(target.module) for target in targets}
    users = _scan.parameter_users(model)
    chosen, kept = [], []
    for module, (name, places) in found.items():
        weight = module._parameters.get("weight")
        if weight is None or weight.dtype in (torch.bfloat16, torch.float16):
            continue  # takes no more than bf16 does
        pattern = _scan.skip_pattern(config, [name])
        if pattern is not None:
            kept.append((name, f"skip={pattern!r}"))
        elif type(module) is not nn.Embedding:
            kept.append((name, f"{type(module).__name__} is not a plain nn.Embedding"))
        elif users[id(weight)] - going - {id(module)}:
            kept.append((name, "its weight is shared with a module that stays in float"))
        elif weight.is_meta or hasattr(module, "_hf_hook"):
            raise Int4Error(f"{name}: has no values here (meta device or accelerate hook). Load it, then patch()")
        else:
            chosen.append((name, module, places))
    return chosen, kept


def store_bf16(name: str, old: nn.Embedding, places: list[tuple[nn.Module, str]], report: PatchReport) -> None:
    new = Bf16Embedding.from_embedding(old)
    _hooks.replace(old, new, places)
    report.embeddings.append((name, 4 * old.weight.numel(), 2 * old.weight.numel()))
