"""Checks that formats share: fields of a `quantization_config`, and tensors of a file, before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_int4.config import is_group_size
from torch_int4.errors import Int4Error
from torch_int4.weights.canonical import Int4Weight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_MISSING = object()


def choice(config: Mapping[str, Any], key: str, accepted: tuple[Any, ...], default: Any = _MISSING) -> Any:
    """`config[key]`, which must be one of `accepted`; with its type, so that True is not 1."""
    value = config.get(key, default)
    if value is _MISSING:
        raise Int4Error(f"quantization_config.{key}: is missing; accepted: {_listed(accepted)}")
    if not any(type(value) is type(item) and value == item for item in accepted):
        raise Int4Error(f"quantization_config.{key}: {_short(value)} is not served; accepted: {_listed(accepted)}")
    return value


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """`config[key]` as True or False; None counts as the default."""
    value = config.get(key)
    return bool(choice(config, key, (True, False))) if value is not None else default


def group_size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """`config[key]`: inputs per group, or -1."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or (value != -1 and not 0 < value <= 1 << 24):
        raise Int4Error(f"quantization_config.{key}: {_short(value)} is not a group size; needs a positive one or -1")
    return value


def names(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """`config[key]`, a list of module names or patterns, or None."""
    value = config.get(key) or ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise Int4Error(f"quantization_config.{key}: must be a list of names, got {_short(value)}")
    return tuple(value)


def take(
    tensors: Mapping[str, Tensor],
    suffix: str,
    name: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """The tensor of that suffix, with the dtype and shape that it must have."""
    tensor = tensors.get(suffix)
    full = f"{name}.{suffix}"
    if tensor is None:
        raise Int4Error(f"{full}: is missing in the checkpoint")
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        raise Int4Error(f"{full}: has no values; load the checkpoint's tensors first")
    if tensor.dtype not in dtypes:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise Int4Error(f"{full}: must be {accepted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise Int4Error(f"{full}: must have shape {list(shape)}, got {list(tensor.shape)}")
    return tensor.detach()


def floats(tensors: Mapping[str, Tensor], suffix: str, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """A tensor of finite floats (fp16, bf16 or fp32)."""
    tensor = take(tensors, suffix, name, FLOATS, shape)
    if not bool(torch.isfinite(tensor).all()):
        raise Int4Error(f"{name}.{suffix}: holds NaN or infinity, so the checkpoint is damaged")
    return tensor


def on_cpu(tensor: Any, name: str) -> None:
    """Raise for the tensor of a live module that has no values, or has them elsewhere."""
    if tensor.is_meta:
        raise Int4Error(f"{name}: its weight is on the meta device and has no values. Load the weights, then patch()")
    if tensor.device.type != "cpu":
        raise Int4Error(
            f"{name}: its weight is on {tensor.device}. Kernels run on CPUs: model.to('cpu') before patch()"
        )


def count_groups(inputs: int, size: int) -> int:
    """Groups of a row, the last of which may be shorter."""
    return 1 if size == -1 else -(-inputs // size)


def groups_of(found: int, inputs: int, declared: int, *, mixed: bool, name: str) -> int:
    """The group size of a linear whose tensors have `found` groups per row.

    Raises:
        Int4Error: it is not the declared one, and the config declares no exceptions (or the number is impossible).
    """
    if found == count_groups(inputs, declared):
        return declared
    if mixed and found > 0 and inputs % found == 0:
        return -1 if found == 1 else inputs // found
    raise Int4Error(
        f"{name}: has {found} groups of scales, but {inputs} inputs in groups of {declared} make "
        f"{count_groups(inputs, declared)}"
    )


def no_integer_grid(weight: Int4Weight) -> str | None:
    """What keeps a weight from being codes of 4 or 8 bits, integer zero points and a scale for each group; or None."""
    if weight.codebook is not None or weight.scales.dtype == torch.uint8:
        return "has a code book"
    if weight.offsets is not None:
        return "has float offsets (zeros='float')"
    if weight.multipliers is not None:
        return "has scales of two levels"
    return None if weight.bits in (4, 8) else f"has codes of {weight.bits} bits"


def serve(weight: Int4Weight, name: str) -> Int4Weight:
    """The weight, validated, with groups that kernels can serve: large ones are cut, which changes no value.

    Raises:
        Int4Error: it is not valid, or its groups cannot be cut to a multiple of 32.
    """
    weight.validate(name)
    size = weight.group_size
    if size == -1 or size >= weight.in_features:
        weight.group_size = -1 if not is_group_size(size) else size
        return weight
    if is_group_size(size) or weight.records is not None:
        return weight
    parts = next((p for p in range(2, size // 32 + 1) if size % p == 0 and is_group_size(size // p)), None)
    if parts is None:
        raise Int4Error(
            f"{name}: groups of {size} inputs are not served: a multiple of 32 is needed. "
            "Quantize the float model again with a group size of 32, 64 or 128"
        )
    smaller = size // parts
    groups = count_groups(weight.in_features, smaller)
    weight.group_size = smaller
    for field in ("scales", "zeros", "offsets"):
        value = getattr(weight, field)
        if value is not None:
            setattr(weight, field, value.repeat_interleave(parts, 1)[:, :groups].contiguous())
    return weight


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(repr(value) for value in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
