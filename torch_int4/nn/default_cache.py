"""The managed KV cache for who asks for none: `generate()`, and `model(...)` with `use_cache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from torch_int4.cache.int4_cache import Int4Cache
from torch_int4.nn.continuous import ContinuousBatching
from torch_int4.support.forwards import CACHES, cache_argument
from torch_int4.support.mixins import Mixin

SETTING = "torch_int4_kv_cache"  # attribute of a model: what its caches store
MOST_AT_FIRST = 4096  # tokens; a limit of generate() far above what is generated must not cost memory


def is_replaceable(cache: Any) -> bool:
    """Whether a cache is one of transformers' plain ones, and empty."""
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        and not any(layer.is_initialized for layer in cache.layers)
    )


class ManagedGeneration(ContinuousBatching, Mixin):
    """Mixed into models that generate: the cache that `generate` makes by default is ours.

    Continuous batching keeps transformers' paged cache, or is refused where that would give wrong tokens.
    """

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = [name for name in CACHES if model_kwargs.get(name) is not None]
        result = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
        made = next((name for name in CACHES if is_replaceable(model_kwargs.get(name))), None)
        if made is not None and not given:
            longest = kwargs.get("max_cache_length", args[-1] if args else 0)
            model_kwargs[made] = Int4Cache(
                self.config,  # type: ignore[attr-defined]
                dtype=getattr(self, SETTING),
                capacity=min(longest, MOST_AT_FIRST) if isinstance(longest, int) else 0,
            )
        return result


def provide_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook of a decoder: gives it our cache where it would make one of transformers'."""
    if len(args) > 1 or torch.compiler.is_compiling() or any(kwargs.get(name) is not None for name in CACHES):
        return None
    use_cache = kwargs.get("use_cache")
    config: Any = module.config
    if not (config.use_cache if use_cache is None else use_cache) or module.training:
        return None
    inputs = [x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if isinstance(x, Tensor)]
    if not inputs or inputs[0].device.type != "cpu":
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *module.parameters())):
        return None
    kind: Any = type(module)
    name = cache_argument(kind)
    if name is None:
        return None
    return args, {**kwargs, name: Int4Cache(config, dtype=getattr(module, SETTING))}
