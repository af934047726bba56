"""Two codes of 4 bits in a byte, taken apart and put together."""

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
    """Codes uint8 `[N, K]` as files hold them: two in a byte (`join`) where they have 4 bits."""
    return join(codes) if bits == 4 else codes


def restored(values: Tensor, bits: int, columns: int) -> Tensor:
    """The codes uint8 `[N, columns]` of what `stored` made of them."""
    return split(values)[:, :columns].contiguous() if bits == 4 else values
