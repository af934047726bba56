"""Our attention operator as an attention implementation of transformers, for models without a layout of their own.

Their modules project and rotate as ever and fill whatever cache they are given; only the attention itself is ours.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from torch_int4.nn.attend import FLOATS, additive, attend, is_mask
from torch_int4.nn.attention import HARMLESS
from torch_int4.support.forwards import arguments_read, attention_function, forward_arguments

NAME = "torch_int4"  # transformers looks for "sdpa", "flash", "flex" and "eager" inside of names
WITH_MASK = "torch_int4_with_mask"  # for modules that compute with the mask: always there, and added to scores
NAMES = (NAME, WITH_MASK)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention for `[batch, heads, tokens, head size]` and keys alike; returns `[batch, tokens, heads, size]`."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # The masks have the window.
    others = [name for name, x in kwargs.items() if x is not None and name not in HARMLESS and name != "sliding_window"]
    served = _is_served(query, key, value, attention_mask) and _are_sinks(s_aux, query)
    if dropout or (others and _may_matter(type(module), others)) or not served:
        kwargs |= {"softcap": softcap, "s_aux": s_aux}
        return _stock(module, query, key, value, attention_mask, dropout, scaling, causal=causal, **kwargs)
    query = query.transpose(1, 2)
    query = query if query.stride(-1) == 1 else query.contiguous()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options: dict[str, Any] = {"scale": scale, "softcap": softcap or 0.0, "sinks": s_aux}
    return attend(query, key, value, attention_mask, causal=causal, **options), None


def _are_sinks(sinks: Any, query: Tensor) -> bool:
    """Whether the operator takes these as a score for each head; None is one."""
    if sinks is None:
        return True
    if torch.is_grad_enabled() and sinks.requires_grad:
        return False
    return bool(sinks.shape == query.shape[1:2] and sinks.dtype in FLOATS and sinks.is_contiguous())


def _may_matter(kind: type, names: list[str]) -> bool:
    """Whether the attention module names one of these arguments, or a function that `_stock` calls may read it."""
    if torch.compiler.is_compiling():  # which cannot trace a look at sources
        return True
    eager = attention_function(kind, "eager")
    read = [forward_arguments(kind), arguments_read(sdpa_attention_forward)]
    read += [] if eager is None else [arguments_read(eager)]
    return any(each is None or not each.isdisjoint(names) for each in read)


def _is_served(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> bool:
    tensors = (query, key, value)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    if any(x.dtype not in FLOATS or x.device.type != "cpu" for x in tensors) or not is_mask(mask):
        return False
    return query.shape[1] % key.shape[1] == 0 and (mask is None or mask.shape[-1] == key.shape[2])


def _stock(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    *,
    causal: bool,
    softcap: float | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The output of transformers' own function; the plain one of the model's file knows caps, sinks and the like."""
    if softcap is None and kwargs.get("s_aux") is None:
        kwargs = {name: value for name, value in kwargs.items() if name != "s_aux"}
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal, **kwargs
        )
    if kwargs.get("s_aux") is None:
        kwargs.pop("s_aux", None)
    plain = sys.modules[type(module).__module__].eager_attention_forward
    tokens, keys = query.shape[2], key.shape[2]
    if mask is None and causal and tokens > 1:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None:
        mask = additive(mask, query.dtype)
    return plain(module, query, key, value, mask, dropout=dropout, scaling=scaling, softcap=softcap, **kwargs)


for _name, _mask in zip(NAMES, (sdpa_mask, eager_mask), strict=True):
    AttentionInterface.register(_name, attention_forward)
    AttentionMaskInterface.register(_name, _mask)
