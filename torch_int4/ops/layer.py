"""The operators of decoder layers: shapes for `torch.compile`, and gradients.

All take packed weights as `int4_linears` does (see torch_int4.ops), and x `[..., in_features]` of float32, bfloat16 or
float16.

`normalize(x, norm_weight, norm_bias=None, *, norm="rms", eps=1e-6, norm_offset=0.0) -> Tensor` is a norm, which
computes in float32, with parameters `[in_features]` of the dtype of x. `norm="rms"` (arXiv:1910.07467) divides by the
root of the mean square plus `eps`, rounds to the dtype of x and multiplies by the weight, as Llama does; with a
`norm_offset` it multiplies by (offset + weight) before it rounds, as Gemma does. `norm="layer"` (arXiv:1607.06450) is
LayerNorm, with `norm_bias` or without.

`norm_linears(x, norm_weight, norm_bias, weights, scales, offsets, biases, perm=None, *, out_features, group_size,
weight_type="int4", compute="int8", out_dtype=None, norm="rms", eps=1e-6, norm_offset=0.0) -> Tensor[]` is
`int4_linears` of `normalize(x)`.

`linear_add(x, residual, weight, scales, offsets=None, bias=None, perm=None, *, out_features, group_size,
weight_type="int4", compute="int8") -> Tensor` is `residual + int4_linear(x)`, the product rounded to the dtype of x
before the sum. residual is `[..., out_features]` of the dtype of x, and so is the result.

`mlp(x, residual, norm_weight, norm_bias, weights, scales, offsets, biases, perm=None, down_perm=None, *,
out_features, group_size, weight_type="int4", compute="int8", activation="silu", norm="rms", eps=1e-6,
norm_offset=0.0) -> Tensor` is `residual + down(activation(gate(x)) * up(x))` of a normalized x, or without a gate
`residual + down(activation(up(x)))`; the lists hold what belongs to gate, up and down, or to up and down. Without
`norm_weight` there is no norm, without residual no sum. `activation` is "silu", "gelu" or "gelu_tanh"
(arXiv:2002.05202). Each step rounds to the dtype of x, as separate modules would.

`decoder_layer(x, norm_weights, norm_biases, head_norms, weights, scales, offsets, biases, perms, cos, sin, key_cache,
value_cache, key_scales, value_scales, length, mask=None, *, out_features, group_size, weight_type="int4",
compute="int8", activation="silu", norm="rms", eps=1e-6, norm_offset=0.0, projections=3, parallel_residual=False,
rotary_dim=0, interleaved=False, scale, softcap=0.0) -> Tensor` is all of a layer, x `[batch, tokens, features]` to
the same: `norm_linears`, `rotary_append` to the cache (see ops/attention.py), `attention` (causal without a mask),
`linear_add` and `mlp`, with the same bits. The lists hold what belongs to the projections, the output projection, and
gate, up and down. There are 3 `projections`, for query, key and value, or 1, which gives for each kv head its queries,
its key and its value; heads are as many as the caches say. Those with one input share the first one's perm. The norms
are that before attention and that before the MLP; with `parallel_residual` the MLP gets the x that attention gets, and
there may be one norm for both. `head_norms` are the weights of two more of the same kind, `[head size]`, for each head
of the queries and of the keys before the rotation, or empty.

`prepare_decoder_layer(norm_weights, norm_biases, head_norms, weights, scales, offsets, biases, perms, *,
out_features, group_size, weight_type="int4", compute="int8", activation="silu", norm="rms", eps=1e-6,
norm_offset=0.0, projections=3, parallel_residual=False, interleaved=False, kv_heads, head_size, value_size) -> int`
checks all of a layer that stays the same and keeps it, under the number that it returns.
`prepared_decoder_layers(x, layers, cos, sin, key_caches, value_caches, key_scales, value_scales, lengths, mask,
rotary_dim, scale, softcap) -> Tensor` is `decoder_layer` of the layers with these numbers, each on what the one before
gave, with its own entry of the lists; all tensors may be written to in between, and a tensor that got another storage
(`.data`, `set_`, `resize_`) is checked again. `release_decoder_layer(layer)` forgets one. Without shapes for
`torch.compile`, as graphs take none of them.

All raise `RuntimeError` naming the argument that does not fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.ops.fakes import fake


@fake("normalize")
@fake("decoder_layer")
def _alike(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@fake("norm_linears")
def _norm_linears(x: Tensor, out_features: list[int], out_dtype: torch.dtype | None) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], rows), dtype=out_dtype or x.dtype) for rows in out_features]


@fake("linear_add")
def _linear_add(x: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@fake("mlp")
def _mlp(x: Tensor, out_features: list[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features[-1]))


def _no_gradient(ctx: Any, *grads: Any) -> None:
    raise Int4Error("operators of whole blocks are for inference; call the modules where gradients are needed")


# decoder_layer writes into its arguments, so PyTorch takes no formula for it.
for _name in ("normalize", "norm_linears", "linear_add", "mlp"):
    torch.library.register_autograd(f"torch_int4::{_name}", _no_gradient)
