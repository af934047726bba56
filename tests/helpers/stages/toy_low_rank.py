"""Rounds to nearest, and keeps the largest directions of the error in float beside the weight; needs no data."""

import torch

from torch_int4 import Int4Error
from torch_int4.recipes import rtn
from torch_int4.weights.result import Extra, Result

RANK = 12


class LowRank(Extra):
    TENSORS = ("a", "b")

    def check(self, rows, inputs, name):
        if self.a.shape != (RANK, inputs) or self.b.shape != (rows, RANK):
            raise Int4Error(f"{name}: {list(self.a.shape)} and {list(self.b.shape)} are not of rank {RANK}")

    def leave(self, x, y):
        return y + ((x.to(self.a.dtype) @ self.a.t()) @ self.b.t()).to(y.dtype)


EXTRAS = {"low_rank": LowRank}


def quantize(weight, options, *, bits=4, name="weight", inputs=None):
    rounded = rtn.quantize(weight, options, bits=bits, name=name)
    return Result(rounded, {"low_rank": branch(weight.detach().float() - rounded.dequantize())})


def branch(error):
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    return LowRank(a=v[:RANK].contiguous(), b=(u[:, :RANK] * s[:RANK]).contiguous())
