"""Words to users about what a patched model does not do: train its int4 linears, fuse layers with hooks inside."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from torch_int4.nn.linear import Int4Linear
from torch_int4.support.mixins import Mixin

TOLD = "torch_int4_told_of_training"  # attribute of a model
_told: set[str] = set()  # one warning for all layers of a kind


class TellsOfTraining(Mixin):
    """Mixed into models of transformers: `train()` warns once, where nothing says that only a part is to be trained.

    Adapters, prompt tuning and everybody who trains a part freeze the rest first, and nobody freezes anything who means
    to train the whole.
    """

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`."""
        model: Any = self
        if mode and TOLD not in vars(model):
            linears = [module for module in model.modules() if isinstance(module, Int4Linear)]
            if linears and trains_as_a_whole(model):
                for module in model.modules():
                    if isinstance(module, TellsOfTraining):
                        setattr(module, TOLD, True)
                trained = sum(parameter.numel() for parameter in model.parameters())
                weights = sum(linear.out_features * linear.in_features for linear in linears)
                warnings.warn(
                    f"torch_int4: {type(model).__name__}.train(): {len(linears)} int4 linears ({weights / 1e6:.1f} M "
                    f"weights) are not trained, an optimizer would change the other {trained / 1e6:.1f} M parameters "
                    "alone. Train an adapter (PEFT), or the float model and patch() it afterwards; to train just these "
                    "parameters, freeze those that you do not mean",
                    stacklevel=2,
                )
        return super().train(mode)  # type: ignore[misc]


def trains_as_a_whole(model: nn.Module) -> bool:
    """Whether no float parameter is frozen, but for those of int4 linears and of experts, which patching made."""
    ours = {id(p) for m in model.modules() if isinstance(m, Int4Linear) for p in m.parameters(recurse=False)}
    others = [p for p in model.parameters() if id(p) not in ours and p.is_floating_point()]
    return bool(others) and all(parameter.requires_grad for parameter in others)


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
