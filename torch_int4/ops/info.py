"""The kernels, libraries and threads that run here."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from torch_int4 import ops


def info() -> dict[str, Any]:
    """The kernel set in use and what it was chosen from.

    Keys: `version`, `torch`, `isa` (in use), `available` (kernel sets that run on this processor), `built` (all in
    this build), `threads` (of torch's pool, which the operators use). `TORCH_INT4_ISA` forces a kernel set.
    """
    return {
        "version": metadata.version("torch-int4"),
        "torch": torch.__version__,
        "isa": ops.isa(),
        "available": ops.isas(only_supported=True),
        "built": ops.isas(only_supported=False),
        "threads": torch.get_num_threads(),
    }
