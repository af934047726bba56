"""Mistral: as Llama, with a sliding window in its masks."""

import dataclasses

from torch_int4.patches import llama

FAMILY = dataclasses.replace(llama.FAMILY, attention=llama.WINDOWED)
