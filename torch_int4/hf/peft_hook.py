"""PEFT meets int4 linears: plain LoRA merges, kinds that read float weights are refused, copies for training are float.

PEFT reads `weight` in some kinds of adapters, when they are made, used or merged; that of an `Int4Linear` is None. Its
two doors are wrapped as soon as it is imported: the one that puts adapters into a model, and the one that copies
modules which are trained as a whole (`modules_to_save`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from torch_int4.errors import Int4Error
from torch_int4.nn.linear import Int4Linear
from torch_int4.support.after_import import after_import
from torch_int4.support.mixins import Mixin, mix_in
from torch_int4.support.snapshot import Snapshot

MARK = "torch_int4_wrapped"
REMEDY = (
    "Kinds that only add to the output of a linear work on int4 ones (LoRA, DoRA, IA3, OFT, VeRA); for others load the "
    "float model, or leave their linears in float with skip=…"
)


def install() -> None:
    """Wraps PEFT's doors now if PEFT is imported, else when it will be."""
    after_import("peft.tuners.tuners_utils", _wrap_tuners)
    after_import("peft.tuners.adaption_prompt.model", _wrap_adaption_prompt)
    after_import("peft.utils.other", _wrap_copies)


def _wrap_tuners(module: ModuleType) -> None:
    for name in ("__init__", "inject_adapter"):
        _wrap(module.BaseTuner, name, _guarded)


def _wrap_adaption_prompt(module: ModuleType) -> None:
    _wrap(module.AdaptionPromptModel, "__init__", _guarded)


def _wrap_copies(module: ModuleType) -> None:
    _wrap(module.ModulesToSaveWrapper, "update", _with_float_copies)


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    stock = vars(owner)[name]
    if not hasattr(stock, MARK):
        made = functools.wraps(stock)(wrapper(stock))
        setattr(made, MARK, True)
        setattr(owner, name, made)


def _guarded(stock: Any) -> Any:
    """A method that puts adapters into a model, its first argument; after an error the model is what it was."""

    def method(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(module, Int4Linear) for module in model.modules()):
            return stock(self, model, *args, **kwargs)
        before = Snapshot(model)
        known = {id(module) for module in model.modules()}
        try:
            with _told(type(self).__name__):
                result = stock(self, model, *args, **kwargs)
            _adopt([module for module in model.modules() if id(module) not in known])
        except Exception:
            before.restore()
            raise
        return result

    return method


def _adopt(layers: list[nn.Module]) -> None:
    """Let new layers over int4 linears merge, or say why not; and try that they work."""
    from torch_int4.hf.adapters import mergeable

    layer: Any
    for layer in layers:
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else None
        if not isinstance(base, Int4Linear) or not hasattr(layer, "merge"):
            continue
        mergeable(layer)
        mix_in(SaysWhyNot, layer)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                with _told(type(layer).__name__):
                    layer(torch.zeros(1, base.in_features, dtype=base.compute_dtype))
            except Int4Error:
                raise
            except Exception:  # it wants more than a linear gets, or is not complete yet
                continue


class SaysWhyNot(Mixin):
    """Mixed into adapters over int4 linears."""

    def merge(self, *args: Any, **kwargs: Any) -> Any:
        """As the adapter's own.

        Raises:
            Int4Error: it would write into a float weight.
        """
        with _told(type(self).__name__, "merging it", "Use it unmerged, or merge it into the float model"):
            return super().merge(*args, **kwargs)  # type: ignore[misc]


@contextlib.contextmanager
def _told(what: str, doing: str = "it", remedy: str = REMEDY) -> Iterator[None]:
    """Says what an error about a weight that is None is about."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        if "NoneType" not in str(error):
            raise
        raise Int4Error(f"{what}: {doing} needs the float weight of a linear, which is int4. {remedy}") from error


def _with_float_copies(stock: Any) -> Any:
    """The method that copies a module to train it as a whole; int4 linears of the copy become float ones."""

    def update(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        known = adapter_name in self.modules_to_save
        stock(self, adapter_name, *args, **kwargs)
        if not known:
            copied = self.modules_to_save[adapter_name]
            self.modules_to_save[adapter_name] = _as_float(copied, adapter_name == self.active_adapter)

    return update


def _as_float(module: nn.Module, trained: bool) -> nn.Module:
    if isinstance(module, Int4Linear):
        made = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        made.weight = nn.Parameter(module.dequantize(module.compute_dtype), requires_grad=trained)
        made.bias = module.bias
        return made.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, _as_float(child, trained))
    return module
