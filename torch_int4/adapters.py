"""PEFT adapters on int4 linears: the public door to `torch_int4.hf.adapters`."""

from torch_int4.hf.adapters import mergeable

__all__ = ["mergeable"]
