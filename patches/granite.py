"""Granite: as Llama, with a scale of its own, and factors on what is added to the residual."""

import dataclasses

from torch_int4.patches import llama

FAMILY = dataclasses.replace(llama.FAMILY, blocks=())
