"""This package: plain `model.generate` of transformers on a patched model."""

from __future__ import annotations

from typing import Any

import torch

from torch_int4 import ops
from torch_int4.evals.bench.engines import Spec
from torch_int4.evals.bench.engines._transformers import Generating
from torch_int4.evals.bench.shapes import head_shape, linears


class Ours(Generating):
    """A patched model. With real weights from a Q4_1 file, its grid is found again: the very same weights."""

    name = "torch_int4"

    def __init__(self, spec: Spec) -> None:
        super().__init__(build(spec), spec)

    @staticmethod
    def missing(spec: Spec) -> str | None:
        """Only files of real weights can be missing."""
        return _file_missing(spec)

    @staticmethod
    def memory(spec: Spec) -> int:
        """Packed weights, the embedding and the head in the form that the head is made from."""
        skeleton = spec.model.skeleton()
        weights = sum(module.out_features * module.in_features for _, module in linears(skeleton))
        rows, columns = head_shape(skeleton)
        most = 4 if spec.model.file else 1  # real weights come through the float model
        return int(0.65 * weights * most + 8 * rows * columns) + (1 << 30)

    def version(self) -> str:
        """The kernel set, and how the model is patched."""
        options = self.spec.options
        parts = (f"g{options['group_size']}", options["compute"], options["dtype"], f"{options['head']} head")
        return ", ".join((ops.isa(), *parts))


def build(spec: Spec) -> Any:
    """The patched model of a spec."""
    from torch_int4.evals import models
    from torch_int4.evals.bench.random_model import int4

    options = dict(spec.options)
    dtype = getattr(torch, options.pop("dtype"))
    if spec.model.file:
        import torch_int4

        model, _ = models.load(dtype=dtype)
        fields = {**options, "group_size": 32, "symmetric": False, "zeros": "float"}
        return torch_int4.patch(model, **{"embeddings": "bf16", **fields})
    return int4(spec.model, dtype, spec.context, **options)


def _file_missing(spec: Spec) -> str | None:
    from torch_int4 import Int4Error

    try:
        spec.model.gguf()
    except Int4Error as error:
        return str(error)
    return None


ENGINES = (Ours,)
