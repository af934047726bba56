"""PyTorch's own dynamic quantization: int8 weights and activations, fp32 scales a row, FBGEMM or oneDNN."""

from __future__ import annotations

import warnings
from typing import Any

LABEL = "torch dynamic int8"


def missing() -> str | None:
    """None: torch is always there. Versions that dropped this module name the remedy."""
    try:
        from torch.ao.quantization import quantize_dynamic  # noqa: F401
    except ImportError:
        return "a torch with torch.ao.quantization"
    return None


def build(model_dir: str) -> Any:
    """Every linear but the head, which torch would quantize too; its weight is the embedding's."""
    import torch
    from torch import nn
    from torch.ao.quantization import quantize_dynamic

    from torch_int4.evals import models

    model, _ = models.load(model_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        head = model.get_output_embeddings()
        names -= {name for name, module in model.named_modules() if module is head}
        from torch.ao.quantization import default_dynamic_qconfig

        return quantize_dynamic(model, dict.fromkeys(names, default_dynamic_qconfig), dtype=torch.qint8, inplace=True)
