"""`save_pretrained` of patched models: whole or not at all, in a form that `from_pretrained` reads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from ..atomic import replaced_folder
from ..config import Int4Config
from ..subclass import Mixin, mix_in
from ._stored import state_of

CONFIG = "torch_int4_config"  # attribute of a model: how it was quantized


class SavesInt4(Mixin):
    """Mixed into models of transformers: they save their int4 linears, and a killed save leaves what was there."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`; the folder appears, or is replaced, in one step at the end."""
        save: Any = super().save_pretrained  # type: ignore[misc]
        main = args[0] if args else kwargs.get("is_main_process", True)
        if not main:
            save(save_directory, *args, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with replaced_folder(save_directory) as partial, _as_stored(self):
            save(partial, *args, **kwargs)


class _Writer(HfQuantizer):
    """Hands transformers a state dict that was made beforehand."""

    def __init__(self, config: Any, state: dict[str, Tensor]) -> None:
        super().__init__(config)
        self.state: dict[str, Tensor] | None = state

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        state, self.state = self.state, None  # written tensors are let go of one by one
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


@contextlib.contextmanager
def _as_stored(model: Any) -> Iterator[None]:
    """A model whose config and quantizer are those of the files, for as long as they are written."""
    if getattr(model, "_hf_peft_config_loaded", False):  # then only its adapters are saved
        yield
        return
    state, description = state_of(model, getattr(model, CONFIG))
    kept = [(owner, name, vars(owner).get(name, _Writer)) for owner, name in _changed(model)]
    model.config.quantization_config = description
    model.hf_quantizer = _Writer(getattr(model, CONFIG), state)
    del state
    try:
        yield
    finally:
        for owner, name, value in kept:
            if value is _Writer:  # there was none
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _changed(model: Any) -> list[tuple[Any, str]]:
    return [(model.config, "quantization_config"), (model, "hf_quantizer")]


def make_saveable(model: Any, config: Int4Config) -> None:
    """Have every model of transformers in `model` save itself as it is now."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            setattr(module, CONFIG, config)
            mix_in(SavesInt4, module)
