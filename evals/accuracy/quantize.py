"""Quantizes a loaded model, with calibration text where a recipe wants it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import torch_int4
from torch_int4.errors import Int4Error


def to_int4(model: Any, tokenizer: Any, config: torch_int4.Int4Config, calibration: str | None = None) -> Any:
    """Patches `model` in place and returns it; `calibration` names a text file.

    Raises:
        Int4Error: what `patch` raises, or the file cannot be read.
    """
    given: dict[str, Any] = {}
    if calibration is not None:
        try:
            given["calibration"] = [Path(calibration).read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise Int4Error(f"calibration {calibration!r}: {error}; give a text file in UTF-8") from error
    return torch_int4.patch(model, config, tokenizer=tokenizer, **given)


def is_patched(model: nn.Module) -> bool:
    """Whether a model holds int4 linears."""
    return any(isinstance(module, torch_int4.Int4Linear) for module in model.modules())
