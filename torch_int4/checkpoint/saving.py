"""`save_pretrained` of patched models: whole or not at all, in a form that `from_pretrained` reads."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.base import HfQuantizer

from torch_int4.checkpoint.stored import state_of
from torch_int4.config import Int4Config
from torch_int4.nn.linear import Int4Linear
from torch_int4.support.atomic import replaced_folder
from torch_int4.support.mixins import Mixin, mix_in

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
CARD = """# INT4 weights, saved by torch_int4

```python
import torch_int4

model = torch_int4.from_pretrained("path/to/this/folder")
```

After `import torch_int4`, `AutoModelForCausalLM.from_pretrained` of transformers loads it as well.
{others}
"""
OTHERS = {
    "compressed-tensors": (
        "The files are compressed-tensors (`pack-quantized`), which transformers with the package compressed-tensors, "
        "and other engines, read too."
    ),
    "torch_int4": (
        "Without that import the linears would be left uninitialized: the weights are in a form of torch_int4's own, "
        "because compressed-tensors cannot express them."
    ),
}
CONFIG = "torch_int4_config"  # attribute of a model: how it was quantized


class SavesInt4(Mixin):
    """Mixed into models of transformers: they save their int4 linears, and a killed save leaves what was there."""

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, beside: Sequence[Any] = (), **kwargs: Any
    ) -> None:
        """As `PreTrainedModel.save_pretrained`; the folder appears, or is replaced, in one step at the end.

        The files of the tokenizer travel along if the model came from a folder that has them.

        Args:
            save_directory: the folder.
            *args: as there.
            beside: what else goes into the folder in the same step: a tokenizer, or anything with `save_pretrained`.
            **kwargs: as there.
        """
        save: Any = super().save_pretrained  # type: ignore[misc]
        main = args[0] if args else kwargs.get("is_main_process", True)
        if not main:
            save(save_directory, *args, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with replaced_folder(save_directory) as partial, _as_stored(self) as renamed:
            if not renamed:
                kwargs["save_original_format"] = False
            for other in beside:
                other.save_pretrained(partial)
            save(partial, *args, **kwargs)
            if not getattr(self, "_hf_peft_config_loaded", False):
                _add_companions(self, partial, Path(save_directory))


def _add_companions(model: Any, partial: Path, final: Path) -> None:
    """Tokenizer files from where the model was loaded, and a card, where there are none."""
    source = Path(str(getattr(model, "name_or_path", "") or "."))
    if not any((folder / name).exists() for folder in (partial, final) for name in TOKENIZER_FILES):
        for name in TOKENIZER_FILES:
            if str(source) != "." and (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
    if not any((folder / "README.md").exists() for folder in (partial, final)):
        method = model.config.quantization_config["quant_method"]
        (partial / "README.md").write_text(CARD.format(others=OTHERS[method]), encoding="utf-8")


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
def _as_stored(model: Any) -> Iterator[bool]:
    """A model whose config and quantizer are those of the files, for as long as they are written.

    Yields:
        Whether its int4 weights can have the names that transformers' own checkpoints of such models have.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # then only its adapters are saved
        yield True
        return
    state, description = state_of(model, getattr(model, CONFIG))
    kept = [(owner, name, vars(owner).get(name, _Writer)) for owner, name in _changed(model)]
    try:
        model.config.quantization_config = description
        model.hf_quantizer = _Writer(getattr(model, CONFIG), state)
        renamed = _are_renamed(model, state)
        del state
        yield renamed
    finally:
        for owner, name, value in kept:
            if value is _Writer:  # there was none
                vars(owner).pop(name, None)
            else:
                setattr(owner, name, value)


def _are_renamed(model: Any, state: Mapping[str, Tensor]) -> bool:
    """Whether transformers only renames int4 weights as it saves them, and does not join, split or pad their codes."""
    linears = {name for name, module in model.named_modules() if isinstance(module, Int4Linear)}
    tensors = {key: value.to("meta") for key, value in state.items() if key.rpartition(".")[0] in linears}
    try:
        saved = revert_weight_conversion(model, dict(tensors))
    except Exception:
        return False  # what it does needs more than these tensors, or tensors of other shapes
    return {id(tensor) for tensor in saved.values()} == {id(tensor) for tensor in tensors.values()}


def _changed(model: Any) -> list[tuple[Any, str]]:
    return [(model.config, "quantization_config"), (model, "hf_quantizer")]


def make_saveable(model: Any, config: Int4Config) -> None:
    """Have every model of transformers in `model` save itself as it is now."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            setattr(module, CONFIG, config)
            mix_in(SavesInt4, module)
