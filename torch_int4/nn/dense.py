"""Linears that are in float as yet."""

from __future__ import annotations

from torch import nn

from torch_int4.nn.linear import Int4Linear


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear with a transposed weight, recognised without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear that is not int4 yet."""
    return (isinstance(module, nn.Linear) and not isinstance(module, Int4Linear)) or is_conv1d(module)


def linear_names(model: nn.Module) -> list[str]:
    """Names of every linear of a model that is not int4; of one with several names, the first."""
    return [name for name, module in model.named_modules() if name and is_linear(module)]
