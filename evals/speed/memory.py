"""Bytes that a model's weights occupy, before and after patching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

import torch_int4
from torch_int4.tuning.footprint import weight_bytes


@dataclass(frozen=True)
class Memory:
    """Weight bytes of the patched linears: as they were, in bf16, and now. The head is counted apart."""

    linears: int
    weights: int
    float_bytes: int
    bf16_bytes: int
    int4_bytes: int
    head_float_bytes: int
    head_bytes: int

    @property
    def ratio_to_bf16(self) -> float:
        """Bytes now over bytes in bf16."""
        return self.int4_bytes / self.bf16_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales and offsets included."""
        return 8 * self.int4_bytes / self.weights


def linear_bytes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(number of weights, bytes with bias) of every linear by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = (module.weight.numel(), sum(p.nbytes for p in module.parameters()))
    return found


def patched_memory(model: Any, before: dict[str, tuple[int, int]]) -> Memory:
    """Compares the patched linears of `model` with what `linear_bytes` found before."""
    patched = {n: m for n, m in model.named_modules() if isinstance(m, torch_int4.Int4Linear)}
    head = model.get_output_embeddings()
    body = {name: module for name, module in patched.items() if module is not head}
    weights = sum(before[name][0] for name in body)
    biases = sum(m.bias.numel() for m in body.values() if m.bias is not None)
    heads = [name for name, module in patched.items() if module is head]
    return Memory(
        linears=len(body),
        weights=weights,
        float_bytes=sum(before[name][1] for name in body),
        bf16_bytes=2 * (weights + biases),
        int4_bytes=sum(weight_bytes(nn.ModuleList(body.values())).values()),
        head_float_bytes=sum(before[name][1] for name in heads),
        head_bytes=sum(weight_bytes(patched[name]).get("Int4Linear", 0) for name in heads),
    )
