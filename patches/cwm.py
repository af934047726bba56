"""Code World Model: as Llama, with sliding windows in the masks of some layers."""

import dataclasses

from torch_int4.patches import llama

FAMILY = dataclasses.replace(llama.FAMILY, attention=llama.WINDOWED)
