"""Input embeddings in bf16, for models that compute in another dtype."""

from __future__ import annotations

import torch
from torch import nn

from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.nn.embedding import Bf16Embedding
from torch_int4.patching import hooks as _hooks
from torch_int4.patching import scan as _scan
from torch_int4.patching.report import PatchReport
from torch_int4.patching.scan import Target


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
    """Put a bf16 table into every place of an embedding."""
    new = Bf16Embedding.from_embedding(old)
    _hooks.replace(old, new, places)
    report.embeddings.append((name, 4 * old.weight.numel(), 2 * old.weight.numel()))
