"""Linears that a model class keeps in fp32 when the rest of it is in half precision, such as T5's `wo`."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from torch_int4.nn.linear import Fp32Linear, Int4Linear
from torch_int4.patching.report import PatchReport

HALVES = (torch.float16, torch.bfloat16)
LISTS = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")  # of transformers' models, for fp16 and for both


def is_kept(model: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers loads the module of that name in fp32 when a model is loaded in a dtype."""
    lists = LISTS if dtype is torch.float16 else LISTS[1:] if dtype is torch.bfloat16 else ()
    parts = {part for each in lists for part in (getattr(model, each, None) or ())}
    return any(re.search(rf"(^|\.){part}(\.|$)", name) for part in parts)


def keep(model: nn.Module, report: PatchReport) -> None:
    """Have the int4 linears that stand for such ones compute in fp32, and say so."""
    dtype = next((each.dtype for each in model.parameters() if each.dtype in HALVES), None)
    if dtype is None:
        return
    kept = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is Int4Linear and module.compute_dtype is torch.float32 and is_kept(model, name, dtype)
    ]
    for name, module in kept:
        found: Any = module
        found.__class__ = Fp32Linear
        found.compute = "fp32"
        line = f"{name}: its model keeps it in fp32, so its input, products and output are"
        if line not in report.notices:
            report.notices.append(line)
