"""The engines that can be measured, and this package's operator as one of them.

A contestant holds enough copies of a weight that no cache keeps them, and one call is a pass over all copies. Every
one of them does that, so figures are of weights that come from memory, as those of a whole model do. Other libraries
are in `peers`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from torch_int4 import Int4Linear, Int4Weight, ops
from torch_int4.weights.arena import Arena, Size
from torch_int4.weights.packed import PackedWeight


class Contestant(Protocol):
    """Copies of one weight in some library's form."""

    name: str
    nbytes: int  # of one copy, scales and zero points included
    copies: int
    tolerance: float  # norm of the error over the norm of the product: what its arithmetic may lose

    def bind(self, x: Tensor) -> None:
        """Takes the input, float32 `[M, K]`, in whatever form the library wants."""

    def run(self) -> Tensor:
        """Multiplies x with every copy, and returns a result `[M, N]`."""

    def kernels(self) -> str:
        """The kernel set that ran, or the version of the library."""


class Ours:
    """`Int4Linear` on one kernel set. Copies are shared among kernel sets and arithmetics: the layout is one."""

    tolerance = 0.02

    def __init__(self, layers: list[Int4Linear], isa: str, compute: str) -> None:
        self.name, self.isa, self.compute = f"torch_int4 {isa}", isa, compute
        self.layers, self.copies, self.nbytes = layers, len(layers), layers[0].nbytes

    def bind(self, x: Tensor) -> None:
        """Also selects the kernel set and the arithmetic, outside of what is timed."""
        self.x = x
        ops.set_isa(self.isa)
        for layer in self.layers:
            layer.compute = self.compute

    def run(self) -> Tensor:
        """One call of the module for each copy."""
        for layer in self.layers:
            y = layer(self.x)
        return y

    def kernels(self) -> str:
        """The kernels that the dispatcher has active, asked after the run."""
        return ops.isa()


def copies_of(nbytes: int, rotate: int) -> int:
    """How many copies make at least `rotate` bytes, and at least two."""
    return max(2, -(-rotate // nbytes))


def ours(weight: Int4Weight, rotate: int) -> list[Int4Linear]:
    """Copies of a weight as `patch` leaves them: packed, small ones side by side."""
    size = Size.of(weight)
    sizes = [size] * copies_of(size.nbytes, rotate)
    memory = Arena(sizes)
    return [Int4Linear(PackedWeight.pack(weight, memory.take)) for _ in sizes]
