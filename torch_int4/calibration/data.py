"""Calibration data: whatever the user has, as windows of token ids of one length."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.support.text import builtin_text

PIECE = 1 << 15  # characters of a long text that are tokenized at a time
TEXT_COLUMNS = ("text", "content", "sentence", "prompt")


@dataclass(frozen=True)
class Calibration:
    """The data that a recipe looks at, and how much of it.

    Attributes:
        data: a text or several, a datasets `Dataset` with a column of texts or of `input_ids`, token ids `[T]` or
            `[n, T]`, a DataLoader or any iterable of such things; None for a text that Python brings along.
        tokenizer: needed where `data` is text.
        samples: windows to use; fewer where there is less data.
        length: tokens per window, at most the model's context.
        batch: windows that run at a time.
        seed: chooses the windows, and every random choice of the recipes.
        resume: folder for the state after each block; a run that was interrupted goes on there.
        offload: folder for captured inputs, which are held in memory otherwise.
    """

    data: Any = None
    tokenizer: Any = None
    samples: int = 32
    length: int = 1024
    batch: int = 4
    seed: int = 0
    resume: str | Path | None = None
    offload: str | Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("length", 2), ("batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise Int4Error(f"Calibration.{name} must be a whole number of at least {least}; got {value!r}")

    @classmethod
    def of(cls, data: Any, tokenizer: Any = None) -> Calibration:
        """`data` itself if it is a Calibration, with `tokenizer` filled in, or one of it."""
        if not isinstance(data, Calibration):
            return cls(data, tokenizer)
        if tokenizer is None or data.tokenizer is not None:
            return data
        values = {name: getattr(data, name) for name in cls.__dataclass_fields__}
        return cls(**{**values, "tokenizer": tokenizer})

    def windows(self, model: Any = None) -> Tensor:
        """Token ids int64 `[samples, length]`, chosen by `seed`.

        Raises:
            Int4Error: what is wrong with the data, or a tokenizer is missing.
        """
        length = min(self.length, _context(model))
        order = torch.Generator().manual_seed(self.seed)
        data = self.data
        if data is None:
            warnings.warn(
                "torch_int4: no calibration data was given, so the built-in text is used (the prose of Python's "
                "language reference). Give texts like those the model will see: patch(model, calibration=texts)",
                stacklevel=4,
            )
            data = builtin_text(None)
        wanted = self.samples * length
        ids = _first_tokens(_sequences(data, self.tokenizer, order), 4 * wanted)
        if ids.numel() < 2:
            raise Int4Error("calibration: the data holds fewer than two tokens")
        _check_vocabulary(ids, model)
        length = min(length, ids.numel())
        windows = ids[: ids.numel() // length * length].view(-1, length)
        if self.samples < windows.shape[0]:
            windows = windows[torch.randperm(windows.shape[0], generator=order)[: self.samples].sort().values]
        return windows


def _context(model: Any) -> int:
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 1:
            return value
    return 1 << 30


def _check_vocabulary(ids: Tensor, model: Any) -> None:
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    size = getattr(embedding, "num_embeddings", None)
    if isinstance(size, int) and (int(ids.min()) < 0 or int(ids.max()) >= size):
        raise Int4Error(
            f"calibration: token ids reach from {int(ids.min())} to {int(ids.max())}, the model knows 0 to {size - 1}; "
            "is this its tokenizer?"
        )


def _first_tokens(sequences: Iterable[Tensor], wanted: int) -> Tensor:
    """Sequences one after the other, until there are enough tokens."""
    found, count = [], 0
    for sequence in sequences:
        found.append(sequence)
        count += sequence.numel()
        if count >= wanted:
            break
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def _sequences(data: Any, tokenizer: Any, order: torch.Generator) -> Iterator[Tensor]:
    """The data as int64 `[t]` each; texts and rows of known number in an order chosen by the seed."""
    if isinstance(data, Tensor):
        rows = _ids(data)
        for row in torch.randperm(len(rows), generator=order).tolist() if len(rows) > 1 else range(len(rows)):
            yield rows[row]
    elif isinstance(data, str):
        pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]
        yield from _sequences_of_list(pieces, tokenizer, order)
    elif isinstance(data, Mapping):
        yield from _of_row(data, tokenizer)
    elif hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        yield from _sequences_of_list(data, tokenizer, order)
    elif isinstance(data, Iterable):
        for row in data:
            yield from _of_row(row, tokenizer)
    else:
        raise Int4Error(
            f"calibration: cannot read a {type(data).__name__}; give texts, a Dataset, token ids or a DataLoader"
        )


def _sequences_of_list(rows: Any, tokenizer: Any, order: torch.Generator) -> Iterator[Tensor]:
    if len(rows) and isinstance(rows[0], int):
        yield torch.tensor(list(rows), dtype=torch.int64)
        return
    for row in torch.randperm(len(rows), generator=order).tolist():
        yield from _of_row(rows[row], tokenizer)


def _of_row(row: Any, tokenizer: Any) -> Iterator[Tensor]:
    """Sequences of one row of a data set, or of one batch of a loader."""
    if isinstance(row, Mapping):
        if "input_ids" in row:
            ids = _ids(torch.as_tensor(row["input_ids"]))
            mask = row.get("attention_mask")
            keep = torch.ones_like(ids) if mask is None else torch.as_tensor(mask).reshape(ids.shape)
            yield from (line[kept.bool()] for line, kept in zip(ids, keep, strict=True))
            return
        column = next((name for name in TEXT_COLUMNS if name in row), None)
        if column is None:
            raise Int4Error(
                f"calibration: rows have columns {', '.join(map(str, row))}; one of input_ids, "
                f"{', '.join(TEXT_COLUMNS)} is needed"
            )
        row = row[column]
    if isinstance(row, str):
        if tokenizer is None:
            raise Int4Error("calibration: texts need a tokenizer: patch(model, calibration=texts, tokenizer=tokenizer)")
        ids = tokenizer(row, verbose=False)["input_ids"] if row else []
        yield torch.as_tensor(ids, dtype=torch.int64).flatten()
    elif isinstance(row, Tensor):
        yield from _ids(row)
    elif isinstance(row, (list, tuple)) and row and isinstance(row[0], int):
        yield torch.tensor(row, dtype=torch.int64)
    elif isinstance(row, (list, tuple)):
        yield from itertools.chain.from_iterable(_of_row(part, tokenizer) for part in row)
    else:
        raise Int4Error(f"calibration: cannot read a row of type {type(row).__name__}")


def _ids(tensor: Tensor) -> Tensor:
    """Token ids as int64 `[n, t]`."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or tensor.dim() not in (1, 2):
        raise Int4Error(
            f"calibration: token ids must be whole numbers [T] or [n, T]; got {tensor.dtype} {list(tensor.shape)}"
        )
    return torch.atleast_2d(tensor.detach().cpu().long())
