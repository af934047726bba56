"""The attention half of a patch: fused modules in place, masks they can take, and the managed cache by default."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any, NamedTuple

from torch import nn

from torch_int4.config import Int4Config
from torch_int4.layouts.attention import AttentionLayout, KnownAttention
from torch_int4.layouts.family import Family
from torch_int4.patching import families
from torch_int4.patching.refusals import Refusals, other_settings, unknown_forward, wrong_children
from torch_int4.support.forwards import (
    arguments_read,
    attention_function,
    cache_argument,
    fingerprint,
    forward_arguments,
    positional,
    tells_apart,
)

EAGER = "eager"  # transformers' plain implementation of attention
SDPA = "sdpa"
MASK = "create_causal_mask"  # the function of transformers whose masks have no window
OTHERS = "computes something else unless the implementation of its attention is called 'eager' or 'sdpa'"
KEPT = "attn_implementation='eager' was chosen before patch() and stays; set_attn_implementation({!r}) lets ours run"


class Fused(NamedTuple):
    """The attention modules that were fused, and those that were not.

    Attributes:
        modules: how many are fused as a whole.
        interfaces: how many decoders call the operator by transformers' attention interface.
    """

    modules: int = 0
    interfaces: int = 0


def fuse(model: nn.Module, by_module: dict[int, Family], config: Int4Config, refusals: Refusals) -> Fused:
    """Let the attention of a model run in our operators, as far as the user has not switched that off."""
    if config.attention == "stock" or "transformers" not in sys.modules:  # then there is nothing of theirs
        return Fused()
    fused = interfaces = 0
    for decoder in _decoders(model):
        kept = _chose_eager(decoder)
        count = sum(_fuse_module(module, by_module.get(id(module)), kept, refusals) for module in decoder.modules())
        fused += count
        if count == 0 and not _use_interface(decoder, kept, refusals):
            continue
        interfaces += count == 0
        _manage_cache(decoder, config)
    if fused or interfaces:
        _manage_generation(model, config)
    if not fused and not refusals.lines():
        _refuse_all(model, by_module, refusals)
    return Fused(fused, interfaces)


def _refuse_all(model: nn.Module, by_module: dict[int, Family], refusals: Refusals) -> None:
    """Say so where nothing even looks like the attention of the model's family."""
    from transformers import PreTrainedModel, __version__

    for module in model.modules():
        family = by_module.get(id(module))
        if isinstance(module, PreTrainedModel) and family is not None and family.attentions:
            source = families.source_of(family)
            refusals.add(module, f"holds no decoder with attention as {source} has it (transformers {__version__})")
            return


def _decoders(model: nn.Module) -> list[Any]:
    """The innermost models of transformers that take a KV cache, encoder-decoder ones left out."""
    from transformers import PreTrainedModel

    def takes_cache(module: nn.Module) -> bool:
        if not isinstance(module, PreTrainedModel) or getattr(module.config, "is_encoder_decoder", False):
            return False
        kind: Any = type(module)
        parameters = inspect.signature(kind.forward).parameters
        return cache_argument(kind) is not None and "use_cache" in parameters

    found = [module for module in model.modules() if takes_cache(module)]
    outer = {id(module) for module in found for other in found if other is not module and _is_inside(other, module)}
    return [module for module in found if id(module) not in outer]


def _is_inside(part: nn.Module, whole: nn.Module) -> bool:
    return any(module is part for module in whole.modules())


def _chose_eager(decoder: Any) -> bool:
    """Whether somebody asked for plain attention, which gives the weights of attention, where it is not the default."""
    return decoder.config._attn_implementation == EAGER and bool(getattr(decoder, "_supports_sdpa", False))


def _fuse_module(module: nn.Module, family: Family | None, kept: bool, refusals: Refusals) -> bool:
    """Fuse an attention module, if it is one of its family.

    With `kept`, the implementation of attention that was chosen stays; fused modules run when another one is.
    """
    from torch_int4.nn.attention import FusedAttention
    from torch_int4.support.mixins import mix_in

    if family is None or isinstance(module, FusedAttention):
        return family is not None
    reason = None
    for layout in family.attentions:
        if not all(name in module._modules for name in layout.linears):
            continue
        known = _known(module, layout, family)
        if isinstance(known, KnownAttention):
            config: Any = getattr(module, "config", None)
            if layout.implementation is None:
                pass  # there is one attention only
            elif not kept:
                config._attn_implementation_internal = layout.implementation
            elif layout.implementation != EAGER:
                refusals.add(module, KEPT.format(layout.implementation))
            return mix_in(FusedAttention, module, known)
        reason = reason or known
    if reason is not None:
        refusals.add(module, reason)
    return False


def _known(module: nn.Module, layout: AttentionLayout, family: Family) -> KnownAttention | str:
    """The facts known of an attention module, or the reason why the layout is not true of it."""
    kind: Any = type(module)
    cache = cache_argument(kind)
    if "forward" in module.__dict__:
        return "has another forward than its class"
    if fingerprint(kind) not in layout.forwards:
        return unknown_forward("its forward", family)
    reason = wrong_children(module, layout.children)
    if reason is not None:
        return reason
    for name in layout.attributes:
        if not hasattr(module, name):
            return f"has no attribute {name}"
    reason = other_settings(module, layout.when, family)
    if reason is not None:
        return reason
    if cache is None:
        return "takes no KV cache by a name that torch_int4 knows"
    reason = None if layout.implementation is None else _foreign(module, kind, layout.implementation)
    if reason is not None:
        return reason
    return KnownAttention(layout, cache, _arguments_read(kind, layout.implementation), positional(kind.forward))


def _foreign(module: Any, kind: type, chosen: str) -> str | None:
    """The reason that a module's attention function is somebody else's, now or by the name that will be chosen."""
    for implementation in (module.config._attn_implementation, chosen):
        function = attention_function(kind, implementation)
        if not _is_stock(function, kind.__module__):
            source = f"{function.__module__}.{function.__name__}"
            return f"its attention implementation {implementation!r} is {source}"
    return None


def _is_stock(function: Any, *places: str) -> bool:
    """Whether an attention function is one of transformers or ours, or of these places, or none."""
    return function is None or function.__module__.startswith(("transformers.", "torch_int4.", *places))


@functools.cache
def _arguments_read(kind: type, implementation: str | None) -> frozenset[str] | None:
    """Names of the arguments that stock attention reads, in its `forward` or in the function that this calls."""
    own, function = (
        forward_arguments(kind),
        None if implementation is None else attention_function(kind, implementation),
    )
    others = frozenset() if function is None else arguments_read(function)
    return None if own is None or others is None else own | others


def _use_interface(decoder: Any, kept: bool, refusals: Refusals) -> bool:
    """Have a decoder call our operator, where its modules ask transformers' interface what to call."""
    if not getattr(decoder, "_supports_attention_backend", False) or not decoder._can_set_attn_implementation():
        return False
    if decoder.config._attn_implementation not in (SDPA, EAGER) or not getattr(decoder.config, "is_causal", True):
        return False
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not _is_stock(ALL_ATTENTION_FUNCTIONS.get(decoder.config._attn_implementation)):
        return False
    if _window_is_of_cache(decoder):
        refusals.add(decoder, "the window of its attention is that of transformers' caches, and not in its masks")
        return False
    name = _name_for(decoder)
    if name is None:
        for module in decoder.modules():
            if _tells_apart(module, EAGER):
                refusals.add(module, OTHERS)
        return False
    if kept:
        refusals.add(decoder, KEPT.format(name))
        return False
    decoder.config._attn_implementation_internal = name
    return True


def _window_is_of_cache(decoder: Any) -> bool:
    """Whether caches of transformers drop tokens that a decoder (Moshi) never masks; ours drop none."""
    from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

    masks = {name for name in inspect.unwrap(type(decoder).forward).__code__.co_names if name.endswith("_mask")}
    if not (MASK in masks and masks <= {MASK, "attention_mask", "causal_mask"}):
        return False
    return any(isinstance(layer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=decoder.config).layers)


def _name_for(decoder: Any) -> str | None:
    """The name by which the modules of a decoder can call our attention, for some look at the name and do for "sdpa" or
    "eager" what they do for no other; None where both would be missed.
    """
    from torch_int4.nn.attention_interface import NAME, WITH_MASK

    for name, stands_for in ((NAME, SDPA), (WITH_MASK, EAGER)):
        written_for = stands_for == EAGER or getattr(decoder, "_supports_sdpa", False)
        if written_for and not any(_tells_apart(module, stands_for) for module in decoder.modules()):
            return name
    return None


def _tells_apart(module: nn.Module, implementation: str) -> bool:
    """Whether a module does something else for an implementation of transformers than for a name of ours."""
    from torch_int4.nn.attention_interface import NAME

    kind: Any = type(module)
    return tells_apart(kind, implementation, NAME)


def _manage_cache(decoder: Any, config: Int4Config) -> None:
    from transformers.cache_utils import DynamicCache

    from torch_int4.nn.default_cache import SETTING, is_replaceable, provide_cache

    if getattr(decoder.config, "add_cross_attention", False) or hasattr(decoder, SETTING):
        return
    if is_replaceable(DynamicCache(config=decoder.config)):
        setattr(decoder, SETTING, config.kv_cache)
        decoder.register_forward_pre_hook(provide_cache, with_kwargs=True)


def _manage_generation(model: nn.Module, config: Int4Config) -> None:
    from transformers import GenerationMixin, PreTrainedModel

    from torch_int4.nn.default_cache import SETTING, ManagedGeneration
    from torch_int4.support.mixins import mix_in

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and isinstance(module, GenerationMixin):
            setattr(module, SETTING, config.kv_cache)
            mix_in(ManagedGeneration, module)
