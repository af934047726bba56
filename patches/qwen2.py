"""Qwen2: as Llama, with biases."""

import dataclasses

from torch_int4.layouts.gguf import GgufLayout
from torch_int4.patches import llama

FAMILY = dataclasses.replace(llama.FAMILY, attention=llama.WINDOWED)

GGUF = GgufLayout("qwen2")
