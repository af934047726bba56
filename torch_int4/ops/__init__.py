"""The operators `torch.ops.torch_int4.*`: shapes for `torch.compile` and `export`, gradients, and kernel choice.

Packed weights are three tensors (see csrc/kernels/kernel.h): `weight` uint8 `[panels, lines, 64]`, `scales` float16,
float32 or uint8 (powers of two, E8M0) `[panels, groups, 16]`, and `offsets` (uint8 zero points, or floats of the
scales' type) or None; or, where scales have two levels, `scales` uint8 `[panels, K / 256, bytes of a record]`.
`weight_type` is the name of a row of the table in `weights/types.py`: "int4", "int8", or that of a code book.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_int4 import _C
from torch_int4.errors import Int4Error
from torch_int4.ops import attention, experts, layer
from torch_int4.ops.fakes import fake
from torch_int4.weights.packed import RECORDS, codes_shape, groups_of, records_of, records_shape, stream_shape

_REGISTER = (_C, attention, experts, layer)  # imported because that registers operators, or their shapes


def isa() -> str:
    """Name of the kernel set in use. Raises `Int4Error` when `TORCH_INT4_ISA` names one that cannot run here."""
    try:
        return str(torch.ops.torch_int4.isa())
    except RuntimeError as error:
        raise Int4Error(_last_line(error)) from None


def isas(*, only_supported: bool = True) -> list[str]:
    """Names of the kernel sets that run here (or of all that were built), the preferred one first."""
    return list(torch.ops.torch_int4.isas(only_supported).split(","))


def set_isa(name: str) -> None:
    """Switches to a kernel set by name; "" is the best one. Raises `Int4Error` for one that cannot run here."""
    try:
        torch.ops.torch_int4.set_isa(name)
    except RuntimeError as error:
        raise Int4Error(_last_line(error)) from None


def _last_line(error: RuntimeError) -> str:
    """The operator's message, without the place in the sources that LibTorch puts in front."""
    return str(error).strip().splitlines()[-1]


@fake("pack")
def _pack(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    offsets: Tensor | None,
    group_size: int,
    weight_type: str,
    multipliers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, inputs = codes.shape
    packed = codes.new_empty(codes_shape(rows, inputs, weight_type))
    if multipliers is not None:
        kind = next(k for k in RECORDS if k[1:] == (group_size, offsets is not None))
        return packed, codes.new_empty(records_shape(rows, inputs, kind)), scales.new_empty(0)
    stream = stream_shape(rows, inputs, group_size)
    given = zeros if zeros is not None else offsets
    packed_offsets = scales.new_empty(0) if given is None else given.new_empty(stream)
    return packed, scales.new_empty(stream), packed_offsets


@fake("pack_into")
def _pack_into() -> None:
    return None


@fake("unpack")
def _unpack(
    weight: Tensor, scales: Tensor, offsets: Tensor | None, out_features: int, in_features: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    codes = weight.new_empty(out_features, in_features)
    records = records_of(scales)
    if records is not None:
        levels = scales.new_empty(out_features, scales.shape[1], dtype=torch.float16)
        return codes, levels, torch.empty_like(levels) if records.has_offsets else levels.new_empty(0)
    streams = (out_features, groups_of(in_features, group_size))
    unpacked_offsets = scales.new_empty(0) if offsets is None else offsets.new_empty(streams)
    return codes, scales.new_empty(streams), unpacked_offsets


@fake("unpack_multipliers")
def _unpack_multipliers(scales: Tensor, out_features: int, in_features: int) -> Tensor:
    records = records_of(scales)
    assert records is not None
    groups = groups_of(in_features, records.group_size)
    if records.has_offsets:
        return scales.new_empty(out_features, groups, 2)
    return scales.new_empty(out_features, groups, dtype=torch.int8)


@fake("gather_bits")
def _gather_bits(blocks: Tensor, codes: int) -> Tensor:
    return blocks.new_empty(blocks.shape[0], blocks.shape[1] * codes)


@fake("dequantize")
def _dequantize(
    weight: Tensor, out_features: int, in_features: int, dtype: torch.dtype = torch.float32
) -> Tensor:  # schemas give dtypes as numbers
    return weight.new_empty(out_features, in_features, dtype=dtype)


@fake("int4_linear")
def _int4_linear(x: Tensor, out_features: int, out_dtype: torch.dtype | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype or x.dtype)


@fake("int4_linears")
def _int4_linears(x: Tensor, out_features: list[int], out_dtype: torch.dtype | None) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], rows), dtype=out_dtype or x.dtype) for rows in out_features]


# The gradient with respect to x and the bias, so that adapters train on top; the quantized weight gets none. It is
# that of the dequantized weight: rounding of the activations is treated as the identity (straight through).


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    x, weight, scales, offsets, bias, perm = inputs
    ctx.save_for_backward(weight, scales, offsets, perm)
    ctx.in_features, ctx.x_dtype = x.shape[-1], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.options = {name: keyword_only_inputs[name] for name in ("out_features", "group_size", "weight_type")}


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scales, offsets, perm = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = torch.ops.torch_int4.dequantize(
            weight, scales, offsets, perm, in_features=ctx.in_features, dtype=grad.dtype, **ctx.options
        )
        grad_x = (grad @ dense).to(ctx.x_dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None


torch.library.register_autograd("torch_int4::int4_linear", _backward, setup_context=_save)


def _no_gradient(ctx: Any, *grads: Any) -> None:
    raise Int4Error("int4_linears is for inference; call int4_linear for each weight where gradients are needed")


torch.library.register_autograd("torch_int4::int4_linears", _no_gradient)
