"""The tensors of a layer of the KV cache: allocated ahead, grown by blocks, rows selected, read back."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from torch_int4.errors import Int4Error

BLOCK = 256  # tokens; capacities are multiples of it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


class KVStorage(CacheLayerMixin):
    """Keys and values of one attention layer.

    Attributes:
        stored_keys, stored_values: `[batch, kv heads, capacity, head size]` as they are stored; what lies beyond
            `length` is undefined. None before the first tokens.
        key_scales, value_scales: fp32 `[batch, kv heads, capacity]` of an int8 cache, or None.
        length: int64 `[1]`, the tokens in the cache. Operators read and advance it.
        max_length: tokens that a cache of fixed size holds, None for one that grows.
    """

    def __init__(self, dtype: str = "auto", max_length: int | None = None, capacity: int = 0) -> None:
        self.stored_keys: Tensor | None = None
        self.stored_values: Tensor | None = None
        super().__init__()
        self.kind, self.max_length, self._hint = dtype, max_length, capacity
        self.is_compileable = max_length is not None
        self.key_scales: Tensor | None = None
        self.value_scales: Tensor | None = None
        with _writable():
            self.length = torch.zeros(1, dtype=torch.int64)
        self._count = 0  # the same number without a read of the tensor; not kept where the size is fixed

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return 0 if self.stored_keys is None else self.stored_keys.shape[2]

    @property
    def keys(self) -> Tensor | None:
        """`[batch, kv heads, tokens, head size]` in the dtype of the activations, as layers of transformers show them.

        A cache of fixed size shows all of its capacity, as static ones do. A view where that is the stored dtype.
        """
        return None if self.stored_keys is None else self._read(self.dtype)[0]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._put("keys", value)

    @property
    def values(self) -> Tensor | None:
        """The same of the values."""
        return None if self.stored_values is None else self._read(self.dtype)[1]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._put("values", value)

    def _put(self, name: str, value: Tensor | None) -> None:
        """Transformers' base class sets None at first, and whoever moves caches about sets what was there."""
        shown = getattr(self, name)
        if shown is None and value is None:
            return
        if shown is None or value is None or value.shape != shown.shape or self.key_scales is not None:
            raise Int4Error(f"{name} of an Int4Cache cannot be replaced; use update, crop, reset or a new cache")
        with torch.no_grad():
            self._stored(name).copy_(value)

    def _stored(self, name: str) -> Tensor:
        """A view of what is stored of the tokens."""
        stored: Tensor = getattr(self, f"stored_{name}")
        return stored[:, :, : self._count if self.max_length is None else None]

    def _resolve(self, activations: torch.dtype) -> torch.dtype:
        if self.kind != "auto":
            return DTYPES[self.kind]
        return activations if activations.itemsize == 2 else torch.bfloat16  # half the reads, and the range of fp32

    def _allocate(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> None:
        """Empty storage for states `[batch, kv heads, tokens, head size]`."""
        self.dtype, self.device = keys.dtype, keys.device
        self.batch_size, heads, tokens, _ = keys.shape
        capacity = self.max_length or _blocks(max(tokens, self._hint))
        # Stock modules multiply all of a cache of fixed size, so that it must not hold NaN.
        make = torch.empty if self.max_length is None else torch.zeros
        with _writable():
            self.stored_keys = make(self.batch_size, heads, capacity, keys.shape[3], dtype=dtype)
            self.stored_values = make(self.batch_size, heads, capacity, values.shape[3], dtype=dtype)
            if dtype == torch.int8:
                self.key_scales = make(self.batch_size, heads, capacity, dtype=torch.float32)
                self.value_scales = make(self.batch_size, heads, capacity, dtype=torch.float32)
        if self.max_length is not None and not torch.compiler.is_compiling():
            for tensor in (*self._tensors().values(), self.length):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def _tensors(self) -> dict[str, Tensor]:
        names = ("stored_keys", "stored_values", "key_scales", "value_scales")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _make_room(self, tokens: int) -> None:
        needed = self._count + tokens
        if self.max_length is not None or needed <= self.capacity:
            return
        capacity = _blocks(max(needed, self.capacity + self.capacity // 2))
        for name, old in self._tensors().items():
            with _writable():
                new = old.new_empty(*old.shape[:2], capacity, *old.shape[3:])
            new[:, :, : self._count] = old[:, :, : self._count]
            setattr(self, name, new)

    def _select(self, rows: Tensor) -> None:
        used = slice(self._count if self.max_length is None else None)
        for name, old in self._tensors().items():
            with _writable():
                new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, used] = old[rows, :, used]
            setattr(self, name, new)
        self.batch_size = len(rows)

    def _read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values as `[batch, kv heads, tokens or capacity, head size]`."""
        used = slice(self._count if self.max_length is None else None)
        keys, values = self._stored("keys"), self._stored("values")
        if self.key_scales is not None and self.value_scales is not None:
            keys = keys * self.key_scales[:, :, used, None]
            values = values * self.value_scales[:, :, used, None]
        return keys.to(dtype), values.to(dtype)


def _writable() -> contextlib.AbstractContextManager[Any]:
    """Tensors made in inference mode could not be written outside of it; caches outlive the mode."""
    compiling = torch.compiler.is_compiling()  # which cannot ask for the mode, nor leave it
    inference = not compiling and torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if inference else contextlib.nullcontext()


def _blocks(tokens: int) -> int:
    return max(-(-tokens // BLOCK), 1) * BLOCK
