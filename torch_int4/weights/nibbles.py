"""Codes in files: two of 4 bits in a byte, and apart from them the bits above of codes of 5 and 6."""

from __future__ import annotations

import torch
from torch import Tensor


def low_high(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high halves of uint8 `[...]`, both uint8 `[...]`."""
    return pairs & 15, pairs >> 4


def pair(low: Tensor, high: Tensor) -> Tensor:
    """uint8 `[...]` from the low and the high halves of its bytes, which are 0..15."""
    return low | (high << 4)


def split(pairs: Tensor) -> Tensor:
    """uint8 `[..., C]` to uint8 `[..., 2C]`, each byte's low half first."""
    return torch.stack(low_high(pairs), dim=-1).flatten(-2)


def join(codes: Tensor) -> Tensor:
    """uint8 `[..., C]` of 0..15 to uint8 `[..., ceil(C/2)]`: even places in the low halves; what is missing is zero."""
    padded = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return pair(padded[..., 0::2], padded[..., 1::2])


def stored(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[N, K]` as files hold them, uint8 `[N, stored_columns(bits, K)]`.

    Those of 4 bits are two in a byte (`join`); of 5 and 6 bits the low 4 are stored so, and behind them the higher
    ones, as many codes in a byte as fit, the first one in its lowest bits. Codes of 8 bits are stored as they are.
    """
    if bits == 8:
        return codes
    low, high = join(codes & 15), bits - 4
    if not high:
        return low
    padded = torch.nn.functional.pad(codes >> 4, (0, -codes.shape[-1] % (8 // high))).unflatten(-1, (-1, 8 // high))
    above = (padded << _shifts(high)).sum(-1, dtype=torch.uint8)
    return torch.cat((low, above), dim=-1)


def stored_columns(bits: int, columns: int) -> int:
    """Bytes of a row of so many codes."""
    if bits == 8:
        return columns
    return -(-columns // 2) + -(-columns * (bits - 4) // 8)


def restored(values: Tensor, bits: int, columns: int) -> Tensor:
    """The codes uint8 `[N, columns]` of what `stored` made of them."""
    if bits == 8:
        return values
    low, high = split(values[:, : -(-columns // 2)])[:, :columns], bits - 4
    if not high:
        return low.contiguous()
    above = (values[:, -(-columns // 2) :, None] >> _shifts(high)) & ((1 << high) - 1)
    return low | (above.flatten(1)[:, :columns] << 4)


def _shifts(bits: int) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8)
