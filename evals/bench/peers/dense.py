"""torch's products with the dequantized weight, in bf16 and fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_int4 import Int4Weight
from torch_int4.evals.bench.contestants import Contestant, copies_of


class Dense:
    """`nn.functional.linear` with the dequantized weight."""

    def __init__(self, weight: Int4Weight, rotate: int, dtype: torch.dtype) -> None:
        self.name = "torch " + {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        self.dtype, self.tolerance = dtype, 1e-4 if dtype == torch.float32 else 0.02
        dense = weight.dequantize(dtype)
        self.nbytes = dense.nbytes
        self.copies = copies_of(self.nbytes, rotate)
        self.weights = [dense.clone() for _ in range(self.copies)]

    def bind(self, x: Tensor) -> None:
        """Rounds x to the weight's type."""
        self.x = x.to(self.dtype)

    def run(self) -> Tensor:
        """One product for each copy."""
        for weight in self.weights:
            y = F.linear(self.x, weight)
        return y

    def kernels(self) -> str:
        """The version of torch."""
        return torch.__version__


def builders(weight: Int4Weight, rotate: int) -> dict[str, Callable[[], Contestant]]:
    """Both types, for every weight."""
    return {
        "torch bf16": lambda: Dense(weight, rotate, torch.bfloat16),
        "torch fp32": lambda: Dense(weight, rotate, torch.float32),
    }


def missing() -> str | None:
    """Nothing: torch is here."""
    return None
