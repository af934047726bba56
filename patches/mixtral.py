"""Mixtral: attention as in Llama."""

import dataclasses

from torch_int4.patches import llama

FAMILY = dataclasses.replace(llama.FAMILY, attention=llama.WINDOWED, blocks=())
