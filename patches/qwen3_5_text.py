"""Qwen3.5, its language model: as Qwen3-Next without experts."""

import dataclasses

from torch_int4.patches import qwen3_next

DENSE = dataclasses.replace(qwen3_next.DENSE, forwards=("c894dc1c9b29bc7d", *qwen3_next.DENSE.forwards[1:]))
OLDER = dataclasses.replace(DENSE, forwards=("e9e4a3c80db37b76", *DENSE.forwards[1:]))  # up to transformers 5.23

FAMILY = dataclasses.replace(qwen3_next.FAMILY, blocks=(DENSE, OLDER))
