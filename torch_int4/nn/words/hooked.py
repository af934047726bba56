"""A word about decoder layers that run as stock modules, and so slower, because somebody has put hooks into them."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

_told: set[str] = set()  # one warning for all layers of a kind


def tell_of_hooks(block: nn.Module) -> None:
    """Warns where a module inside of a layer has hooks, once for each kind of layer and hook."""
    for name, module in block.named_modules():
        hooks: list[Any] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if not name or not hooks:
            continue
        text = (
            f"torch_int4: {type(block).__name__} runs as a stock module, and so slower, because {name} in it has a "
            f"hook ({_name_of(hooks[0])})"
        )
        if text not in _told:
            _told.add(text)
            warnings.warn(f"{text}; {_remedy(hooks[0])}", stacklevel=2)
        return


def _name_of(hook: Any) -> str:
    kind = hook if hasattr(hook, "__qualname__") else type(hook)
    return f"{kind.__module__}.{kind.__qualname__}"


def _remedy(hook: Any) -> str:
    if _name_of(hook).startswith("transformers.utils.output_capturing."):
        return (
            "transformers leaves these in a model when it was asked for router logits, attentions or hidden states; "
            "a model that is loaded anew runs fused again"
        )
    return "the layer runs fused again once the hook is removed"
