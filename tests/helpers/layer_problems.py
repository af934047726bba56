"""Problems for the operators of decoder layers: linears, norms, and what the results are compared by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracle
import torch
from torch import Tensor

from torch_int4 import Int4Linear

OPS = torch.ops.torch_int4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPUTE = ("int8", "int8x2", "bf16", "fp32")
ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
}


def linears(
    sizes: list[tuple[int, int]], kind: str = "float", *, perm: bool = False, **options: Any
) -> list[Int4Linear]:
    """Linears of (out_features, in_features); every other one has a bias, those with the same inputs one perm."""
    made = []
    for index, (rows, inputs) in enumerate(sizes):
        weight = oracle.random_weight(rows, inputs, 32, kind, seed=index, **options)
        if perm:
            weight = replace(weight, perm=torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs)))
        bias = torch.randn(rows, generator=torch.Generator().manual_seed(index)) if index % 2 == 0 else None
        made.append(Int4Linear.from_weight(weight, bias))
    return made


def lists(modules: list[Int4Linear]) -> tuple[list[Any], ...]:
    return tuple([getattr(m, n) for m in modules] for n in ("packed", "packed_scales", "packed_offsets", "bias"))


def options_of(modules: list[Int4Linear], compute: str) -> dict[str, Any]:
    """Arguments of operators of several linears, also of those of one, where they are alike."""
    for module in modules:
        module.compute = compute
    sizes, types = [m.group_size for m in modules], [m.weight_type for m in modules]
    return {
        "out_features": [m.out_features for m in modules],
        "group_size": sizes if len(set(sizes)) > 1 else sizes[0],
        "weight_type": ",".join(types) if len(set(types)) > 1 else types[0],
        "compute": compute,
    }


def normalized(x: Tensor, weight: Tensor, bias: Tensor | None, norm: str, eps: float, offset: float) -> Tensor:
    """As modules of transformers do it."""
    if norm == "layer":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if norm == "rms" and offset == 0:
        return weight * y.to(x.dtype)
    return (y * (offset + weight.float())).to(x.dtype)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tolerance(dtype: torch.dtype, compute: str) -> float:
    """Sums in another order move a few roundings, of x or of what int8 makes of it."""
    if dtype == torch.float32:
        return {"fp32": 1e-5, "int8x2": 2e-4}.get(compute, 4e-3)
    return 1.2e-2 if dtype == torch.bfloat16 else 4e-3


def assert_near(got: Tensor, want: Tensor, bound: float) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert oracle.scaled_error(got, want.double()) <= bound


NORMS = [
    ("rms", 1e-6, 0.0, False),
    ("rms", 1e-5, 1.0, False),
    ("rms_once", 1e-6, 0.0, False),
    ("layer", 1e-5, 0.0, True),
    ("layer", 1e-5, 0.0, False),
]
