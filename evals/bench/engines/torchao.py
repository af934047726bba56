"""torchao's int4 weights for CPUs in a model of transformers: torch's own int4 product with bf16 activations."""

from __future__ import annotations

from typing import Any

import torch

from torch_int4.evals.bench.engines import Spec, not_installed
from torch_int4.evals.bench.engines._transformers import Generating
from torch_int4.evals.bench.random_model import fill, fill_all
from torch_int4.evals.bench.shapes import linears

GROUP = 32
MULTIPLE = 64  # rows and columns that the kernel wants


class TorchAo(Generating):
    """Linears in groups of 32 with a zero point; the head stays in bf16, as torchao leaves it."""

    name = "torchao int4"

    def __init__(self, spec: Spec) -> None:
        super().__init__(build(spec), spec)

    @staticmethod
    def missing(spec: Spec) -> str | None:
        """The package, or its config for CPUs, which is a prototype and moves."""
        from torch_int4.evals.bench.engines.ours import Ours

        if missing := not_installed("torchao", install="pip install torchao"):
            return missing
        try:
            _config()
        except ImportError as error:
            return f"torchao has no int4 config for CPUs where it was in 0.18: {error}"
        return Ours.missing(spec)

    @staticmethod
    def memory(spec: Spec) -> int:
        """Weights of 5 bits, embedding and head in bf16."""
        from torch_int4.evals.bench.engines.ours import Ours

        return Ours.memory(spec)

    def version(self) -> str:
        """Of torchao and torch."""
        import torchao

        return f"torchao {torchao.__version__}, g{GROUP}, bf16"


def build(spec: Spec) -> Any:
    """A model in bf16 whose linears are quantized one by one, from random values or from the file's."""
    from torchao.quantization import quantize_

    from torch_int4.evals import models

    dtype, generator = torch.bfloat16, torch.Generator().manual_seed(0)
    model = models.load(dtype=dtype)[0] if spec.model.file else spec.model.skeleton(spec.context)
    config = _config()
    for _, linear in linears(model):
        fill(linear, dtype, generator)
        if linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0:
            quantize_(linear, config)
    return model if spec.model.file else fill_all(model, dtype)


def _config() -> Any:
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)


ENGINES = (TorchAo,)
