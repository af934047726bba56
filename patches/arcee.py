"""Arcee: attention as in Llama."""

import dataclasses

from torch_int4.layouts.gguf import PAIRS, GgufLayout
from torch_int4.patches import llama

FAMILY = dataclasses.replace(llama.FAMILY, blocks=())

GGUF = GgufLayout("arcee", rows={"attn_q": PAIRS, "attn_k": PAIRS})
