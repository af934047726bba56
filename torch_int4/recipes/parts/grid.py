"""The grid of a group of weights: range to scale and offset, weights to codes and back.

Groups are rows `[n, length]` in fp32; scales and zeros (zero points, or minima when the offset is a float)
`[n, 1]`. Ranges are handled in fp64, because max - min may not fit fp32 and their quotient must not lose the
last bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

FP16_NORMAL = 2.0**-14  # the least positive normal number of fp16


def is_fp16(values: Tensor) -> Tensor:
    """Where fp32 `values` are exactly representable in fp16."""
    return values.half().float() == values


def round_fp16(values: Tensor) -> Tensor:
    """fp32 `values` rounded to fp16 where they are in its normal range or exact in it, else unchanged."""
    half = values.half().float()
    keep = ((half.abs() >= FP16_NORMAL) & half.isfinite()) | (half == values)
    return torch.where(keep, half, values)


class Grid:
    """One kind of grid: "symmetric", "integer" or "float", with 4 or 8 bits (8 is symmetric)."""

    def __init__(self, kind: str, bits: int = 4) -> None:
        self.kind, self.bits = kind, bits
        self.levels = 1 << bits

    def bounds(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest weight of each group, fp64; zero lies between them unless offsets are floats."""
        low, high = w.amin(1, keepdim=True).double(), w.amax(1, keepdim=True).double()
        return (low, high) if self.kind == "float" else (low.clamp_(max=0), high.clamp_(min=0))

    def shrink(self, w: Tensor, bounds: tuple[Tensor, Tensor], factor: float) -> tuple[Tensor, Tensor]:
        """The bounds moved towards zero, or towards the mean of the group when the offset is a float."""
        centre = w.mean(1, keepdim=True).double() if self.kind == "float" else 0.0
        return tuple(centre + (bound - centre) * factor for bound in bounds)  # type: ignore[return-value]

    def fit(self, low: Tensor, high: Tensor, steps: int | None = None, first: int = 0) -> tuple[Tensor, Tensor]:
        """Scales and zeros, fp32 and rounded as they are stored, for groups in `low`..`high`.

        Args:
            steps: steps of the scale between the bounds (symmetric: between zero and the larger one); by
                default as many as there are.
            first: float offsets only: the code of `low`.
        """
        if self.kind == "symmetric":
            if self.bits == 8:
                s = torch.maximum(-low, high) / (steps or 127)
            else:
                s = torch.where(-low >= high, low, high) / -(steps or 8)
            s = round_fp16(s.float())
            return s, torch.full_like(s, self.levels // 2)
        s = round_fp16(((high - low) / (steps or self.levels - 1)).float())
        if self.kind == "integer":
            zeros = (-low / _divisor(s)).round_().clamp_(0, self.levels - 1)
            return s, zeros.float()
        return s, _round_offset((low - s.double() * first).float(), s)

    def candidates(self) -> Iterator[tuple[int, int]]:
        """Every (steps, first code) by which a group may lie on a 4-bit grid; those with most codes first."""
        for steps in range(8 if self.kind == "symmetric" else self.levels - 1, 0, -1):
            for first in range(self.levels - steps if self.kind == "float" else 1):
                yield steps, first

    def encode(self, w: Tensor, s: Tensor, z: Tensor) -> Tensor:
        """The nearest codes, as fp32."""
        if self.kind == "float":
            return (w - z).div_(_divisor(s)).round_().clamp_(0, self.levels - 1)
        return (w / _divisor(s)).round_().add_(z).clamp_(0, self.levels - 1)

    def decode(self, codes: Tensor, s: Tensor, z: Tensor) -> Tensor:
        """The weights of codes; overwrites `codes`. The same operations as `Int4Weight.dequantize`."""
        return codes.mul_(s).add_(z) if self.kind == "float" else codes.sub_(z).mul_(s)

    def matches(self, w: Tensor, s: Tensor, z: Tensor) -> Tensor:
        """bool `[n]`: the groups that come back exactly from a scale and offset that fp16 holds."""
        same = (self.decode(self.encode(w, s, z), s, z) == w).all(1)
        return same & is_fp16(s).flatten() & is_fp16(z).flatten()

    def difference(self, w: Tensor, s: Tensor, z: Tensor) -> Tensor:
        """The error of rounding, `[n, length]`."""
        return self.decode(self.encode(w, s, z), s, z).sub_(w)


def _divisor(s: Tensor) -> Tensor:
    # Scale 0 belongs to groups that are constant or too small for fp32; their codes do not matter.
    return torch.where(s == 0, 1.0, s)


def _round_offset(offsets: Tensor, s: Tensor) -> Tensor:
    """Minima rounded to fp16 where that moves the grid by less than 1/32 step, or the group is constant."""
    half = offsets.half().float()
    close = (half - offsets).abs() <= s / 32
    return torch.where(torch.where(s == 0, round_fp16(offsets) == half, close), half, offsets)
