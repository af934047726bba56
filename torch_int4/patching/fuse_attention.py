"""The attention half of a patch: fused modules in place, masks they can take, and the managed cache by default."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from torch import nn

from torch_int4.config import Int4Config
from torch_int4.layouts.attention import AttentionLayout, KnownAttention
from torch_int4.layouts.family import Family
from torch_int4.support.forwards import (
    arguments_read,
    attention_function,
    cache_argument,
    fingerprint,
    forward_arguments,
)


def fuse(model: nn.Module, by_module: dict[int, Family], config: Int4Config) -> tuple[int, int]:
    """Let the attention of a model run in our operators.

    Returns how many modules are fused as a whole, and how many decoders call the operator by transformers'
    attention interface.
    """
    if config.attention == "stock" or "transformers" not in sys.modules:  # then there is nothing of theirs
        return 0, 0
    fused = interfaces = 0
    for decoder in _decoders(model):
        count = sum(_fuse_module(module, by_module.get(id(module))) for module in decoder.modules())
        fused += count
        if count == 0:
            if not _use_interface(decoder):
                continue
            interfaces += 1
        _manage_cache(decoder, config)
    if fused or interfaces:
        _manage_generation(model, config)
    return fused, interfaces


def _decoders(model: nn.Module) -> list[Any]:
    """The innermost models of transformers that take a KV cache, encoder-decoder ones left out."""
    from transformers import PreTrainedModel

    def takes_cache(module: nn.Module) -> bool:
        if not isinstance(module, PreTrainedModel) or getattr(module.config, "is_encoder_decoder", False):
            return False
        parameters = inspect.signature(type(module).forward).parameters
        return cache_argument(type(module)) is not None and "use_cache" in parameters

    found = [module for module in model.modules() if takes_cache(module)]
    outer = {id(module) for module in found for other in found if other is not module and _is_inside(other, module)}
    return [module for module in found if id(module) not in outer]


def _is_inside(part: nn.Module, whole: nn.Module) -> bool:
    return any(module is part for module in whole.modules())


def _fuse_module(module: nn.Module, family: Family | None) -> bool:
    """Fuse an attention module, if it is one of its family."""
    from torch_int4.nn.attention import FusedAttention
    from torch_int4.support.mixins import mix_in

    if isinstance(module, FusedAttention):
        return False
    for layout in family.attentions if family is not None else ():
        known = _known(module, layout)
        if known is not None:
            config: Any = module.config
            config._attn_implementation_internal = layout.implementation
            return mix_in(FusedAttention, module, known)
    return False


def _known(module: nn.Module, layout: AttentionLayout) -> KnownAttention | None:
    """What is known of an attention module, if the layout is true of it."""
    if not all(isinstance(module._modules.get(name), nn.Module) for name in layout.children):
        return None
    if not all(hasattr(module, name) for name in layout.attributes) or "forward" in module.__dict__:
        return None
    kind = type(module)
    cache = cache_argument(kind)
    if cache is None or fingerprint(kind) not in layout.forwards:
        return None
    return KnownAttention(layout, cache, _arguments_read(kind, layout.implementation))


@functools.cache
def _arguments_read(kind: type, implementation: str) -> frozenset[str] | None:
    """Names of the arguments that stock attention reads, in its `forward` or in the function that this calls."""
    own, function = forward_arguments(kind), attention_function(kind, implementation)
    others = frozenset() if function is None else arguments_read(function)
    return None if own is None or others is None else own | others


def _use_interface(decoder: Any) -> bool:
    """Have a decoder call our operator, where its modules ask transformers' interface what to call."""
    if not getattr(decoder, "_supports_attention_backend", False) or not decoder._can_set_attn_implementation():
        return False
    if decoder.config._attn_implementation not in ("sdpa", "eager") or not getattr(decoder.config, "is_causal", True):
        return False
    from torch_int4.nn.attention_interface import NAME

    decoder.config._attn_implementation_internal = NAME
    return True


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
