"""Phi-3.5-MoE: attention as in Llama."""

import dataclasses

from torch_int4.patches import llama

FAMILY = dataclasses.replace(llama.FAMILY, blocks=())
