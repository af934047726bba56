"""torch's own int4 product for CPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_int4 import Int4Weight
from torch_int4.evals.bench.contestants import Contestant, copies_of


class AtenInt4:
    """torch's own int4 product for CPUs, which torchao uses: bf16 activations, w = (code - 8) * scale + zero."""

    name, tolerance = "torch int4 (ATen)", 0.02

    def __init__(self, weight: Int4Weight, rotate: int) -> None:
        self.group = weight.group_size
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
        scales = weight.scales.float()
        zeros = torch.zeros_like(scales) if weight.zeros is None else (8 - weight.zeros.float()) * scales
        streams = torch.stack([scales, zeros], -1).transpose(0, 1).to(torch.bfloat16).contiguous()
        self.nbytes = packed.nbytes + streams.nbytes
        self.copies = copies_of(self.nbytes, rotate)
        self.weights = [(packed.clone(), streams.clone()) for _ in range(self.copies)]

    @staticmethod
    def takes(weight: Int4Weight) -> bool:
        """Whether the operator has a kernel for this weight."""
        whole = weight.in_features % weight.group_size == 0
        return weight.group_size in (32, 64, 128, 256) and weight.out_features % 16 == 0 and whole

    def bind(self, x: Tensor) -> None:
        """Rounds x to bf16."""
        self.x = x.to(torch.bfloat16)

    def run(self) -> Tensor:
        """One product for each copy."""
        for packed, streams in self.weights:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(self.x, packed, self.group, streams)
        return y

    def kernels(self) -> str:
        """The version of torch."""
        return torch.__version__


def builders(weight: Int4Weight, rotate: int) -> dict[str, Callable[[], Contestant]]:
    """The operator, if this torch has it and it takes the weight."""
    if missing() is not None or not AtenInt4.takes(weight):
        return {}
    return {AtenInt4.name: lambda: AtenInt4(weight, rotate)}


def missing() -> str | None:
    """Named if this torch lacks the operator."""
    return None if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu") else "a torch with int4 products for CPUs"
