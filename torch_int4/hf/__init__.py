"""Loading and saving with transformers: quantize while loading, read int4 checkpoints, save what others can read.

`AutoModelForCausalLM.from_pretrained(path, quantization_config=Int4Config())` works as soon as torch_int4 is imported,
and loads what `save_pretrained` wrote; `torch_int4.from_pretrained` also reads the files of other tools.
"""

from __future__ import annotations

from torch import nn

from torch_int4.config import Int4Config
from torch_int4.hf import _register, peft_hook
from torch_int4.hf.load import from_pretrained

__all__ = ["from_pretrained", "make_saveable"]


def make_saveable(model: nn.Module, config: Int4Config) -> None:
    """Have every model of transformers in `model` save its int4 linears with `save_pretrained`."""
    from torch_int4.checkpoint.saving import make_saveable as make

    make(model, config)


_register.install()
peft_hook.install()
