"""transformers as it comes, in bf16 and in fp32."""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_int4.evals.bench.engines import Spec
from torch_int4.evals.bench.engines._transformers import Generating


class Stock(Generating):
    """A float model; the subclass says in which dtype."""

    dtype: torch.dtype

    def __init__(self, spec: Spec) -> None:
        super().__init__(build(spec, self.dtype), spec)

    @staticmethod
    def missing(spec: Spec) -> str | None:
        """Nothing: transformers is always there. Real weights may be missing."""
        from torch_int4.evals.bench.engines.ours import Ours

        return Ours.missing(spec)

    @classmethod
    def _bytes(cls, spec: Spec) -> int:
        parameters = sum(math.prod(parameter.shape) for parameter in spec.model.skeleton().parameters())
        return parameters * torch.finfo(cls.dtype).bits // 8 + (1 << 30)

    def version(self) -> str:
        """Of transformers and torch."""
        return f"{super().version()}, torch {torch.__version__.split('+')[0]}"


class Bf16(Stock):
    """bf16 weights and activations."""

    name, dtype = "transformers bf16", torch.bfloat16

    @staticmethod
    def memory(spec: Spec) -> int:
        """The weights."""
        return Bf16._bytes(spec)


class Fp32(Stock):
    """fp32 weights and activations."""

    name, dtype = "transformers fp32", torch.float32

    @staticmethod
    def memory(spec: Spec) -> int:
        """The weights."""
        return Fp32._bytes(spec)


def build(spec: Spec, dtype: torch.dtype) -> Any:
    """A float model of the spec's shape, or the one of its file."""
    from torch_int4.evals import models
    from torch_int4.evals.bench.random_model import dense

    if spec.model.file:
        return models.load(dtype=dtype)[0]
    return dense(spec.model, dtype, spec.context)


ENGINES = (Bf16, Fp32)
