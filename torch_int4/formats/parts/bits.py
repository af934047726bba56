"""Small integers inside larger ones. A word's low bits hold its first value; words are little-endian."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.weights import nibbles

if sys.byteorder != "little":  # every reader views words as bytes
    raise ImportError("torch_int4.formats reads checkpoints on little-endian machines only")


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 (or uint8) `[R, C]` to uint8 `[R, C * values per word]`, for values of 4 or 8 bits."""
    # through one dimension: a stride of a dimension of size 1 may be anything, and views of another type check it
    values = words.reshape(-1).view(torch.uint8).view(words.shape[0], words.shape[1] * words.element_size())
    return values if bits == 8 else nibbles.split(values)


def pack_words(values: Tensor, bits: int) -> Tensor:
    """uint8 `[R, C]` to int32 `[R, ceil(C * bits / 32)]`; what is missing in the last word is zero."""
    per_word = 32 // bits
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % per_word))
    values = nibbles.stored(values, bits)
    return values.reshape(-1).view(torch.int32).view(values.shape[0], -1)


def words_for(values: int, bits: int) -> int:
    """32-bit words that hold so many values, without padding between them."""
    return -(-values * bits // 32)


def trim(values: Tensor, columns: int, name: str) -> Tensor:
    """`values[:, :columns]`, of which the rest is padding and must be there."""
    if values.shape[1] < columns:
        raise Int4Error(f"{name}: holds {values.shape[1]} values per row, and {columns} are needed")
    return values[:, :columns].contiguous()
