"""Calling operators from modules, past the Python code that PyTorch puts around an operator with a gradient."""

from __future__ import annotations

from typing import Any

import torch


def call(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """`operator(*args, **kwargs)`, without its autograd wrapper where no gradient can be asked for."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator(*args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args, **kwargs)
