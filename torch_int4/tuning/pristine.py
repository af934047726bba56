"""The float model, again and again: a fresh copy for every candidate, without two of them where it came from disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Pristine:
    """Gives fresh float models equal to the one it was made of.

    A model that was loaded from a directory and has not been changed since is loaded from there again, and the
    weights of the given one are let go of meanwhile. Any other one is copied in memory.

    Attributes:
        on_disk: which of the two it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._spare = _reload(model)
        self.on_disk = self._spare is not None
        if self.on_disk:
            _let_go(model)

    def fresh(self) -> Any:
        """A float model of its own, in the mode of the first."""
        if not self.on_disk:
            return copy.deepcopy(self.model)
        spare, self._spare = self._spare, None
        return (spare if spare is not None else _load(self.model)).train(self.model.training)

    def restore(self) -> None:
        """Give the first model its float weights back."""
        if not self.on_disk:
            return
        found = dict(_tensors(self.fresh()))
        for name, tensor in _tensors(self.model):
            tensor.data = found[name].data

    def become(self, other: nn.Module) -> None:
        """Turn the first model, in place, into another one of its kind."""
        training = self.model.training
        self.model.__class__ = other.__class__
        self.model.__dict__.clear()
        self.model.__dict__.update(other.__dict__)
        self.model.train(training)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _folder(model: Any) -> Path | None:
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    folder = Path(name) if isinstance(name, str) and name else None
    usable = folder is not None and (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return folder if usable and hasattr(type(model), "from_pretrained") else None


def _load(model: Any) -> Any:
    folder = _folder(model)
    options = {"dtype": model.dtype, "local_files_only": True}
    attention = getattr(model.config, "_attn_implementation", None)
    if isinstance(attention, str):
        options["attn_implementation"] = attention
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return type(model).from_pretrained(folder, **options)
    finally:
        if shown:
            logging.enable_progress_bar()


def _reload(model: Any) -> Any | None:
    """The model read from its directory, if that gives the very same tensors."""
    if _folder(model) is None:
        return None
    try:
        loaded = _load(model)
    except (OSError, ValueError, RuntimeError, TypeError):
        return None
    theirs, ours = dict(_tensors(loaded)), dict(_tensors(model))
    if theirs.keys() != ours.keys():
        return None
    return loaded if all(_equal(tensor, ours[name]) for name, tensor in theirs.items()) else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _let_go(model: nn.Module) -> None:
    for _, tensor in _tensors(model):
        tensor.data = torch.empty(0, dtype=tensor.dtype)
