"""compressed-tensors, `pack-quantized` (llm-compressor, vLLM): what we save as, because stock loaders read it.

Per linear of N outputs and K inputs, with B bits and G groups:
    weight_packed      int32 [N, ceil(K*B/32)], code - 2^(B-1) stored plus 2^(B-1): our unsigned codes, low bits first
    weight_scale       float [N, G]; [N, 1] per channel; [1] per tensor
    weight_zero_point  int32 [ceil(N*B/32), G], packed along N in the same way (older: int8 [N, G]); when asymmetric
    weight_shape       int64 [2], (N, K)
    weight_g_idx       int32 [K], the group of each input; only in old files with actorder="group"
w = scale * (code - zero point). Source: compressed_tensors 0.20, compressors/pack_quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4.errors import Int4Error
from torch_int4.formats.parts import bits as _bits
from torch_int4.formats.parts import checks as _checks
from torch_int4.formats.parts.format import Format, Settings
from torch_int4.formats.parts.order import from_group_index
from torch_int4.weights.canonical import Int4Weight

PACKED = "pack-quantized"


class CompressedTensors(Format):
    """Weight-only integer groups of `quant_method: compressed-tensors`."""

    name = "compressed_tensors"
    writes = True

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By its method, for the packed format of integers."""
        return config.get("quant_method") == "compressed-tensors" and "mxfp4" not in str(config.get("format"))

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """Groups with other bits than 4 or 8, quantized activations or caches, sparsity and rotations are refused."""
        for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
            _refuse_extra(config, key)
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise Int4Error("quantization_config.config_groups: must be a table with at least one group")
        found = [_group_settings(key, group, config.get("format")) for key, group in groups.items()]
        main = min(found, key=lambda settings: settings.bits)
        mixed = any(settings != main for settings in found)
        skip = _checks.names(config, "ignore")
        return Settings(main.bits, main.group_size, main.symmetric, main.layout, main.act_order, mixed, skip)

    def suffixes(self, settings: Settings) -> dict[str, bool]:
        """Packed codes, their scales and shape; zero points where there are any."""
        return {
            "weight_packed": True,
            "weight_scale": True,
            "weight_shape": True,
            "weight_zero_point": not (settings.symmetric or settings.mixed),
            "weight_g_idx": False,
        }

    def read(
        self, tensors: Mapping[str, Tensor], settings: Settings, *, shape: tuple[int, int], name: str
    ) -> Int4Weight:
        """See `Format.read`."""
        rows, inputs = shape
        said = _checks.take(tensors, "weight_shape", name, (torch.int64, torch.int32), (2,)).tolist()
        if said != [rows, inputs]:
            raise Int4Error(f"{name}.weight_shape: says {said}, but the model's linear is {[rows, inputs]}")
        packed = _checks.take(tensors, "weight_packed", name, (torch.int32,))
        bits = _bits_of(packed, settings, shape, name)
        codes = _bits.trim(_bits.unpack_words(packed, bits), inputs, name)
        scales = _read_scales(tensors, rows, name)
        groups = scales.shape[1]
        size = _checks.groups_of(groups, inputs, settings.group_size, mixed=settings.mixed, name=f"{name}.weight_scale")
        zeros = _read_zeros(tensors, settings, bits, (rows, groups), name)
        weight = Int4Weight(codes, scales, zeros=zeros, group_size=size, bits=bits)
        index = tensors.get("weight_g_idx")
        if index is not None and not bool((index == -1).all()):  # -1 says that there is no order
            from_group_index(weight, _checks.take(tensors, "weight_g_idx", name, (torch.int32, torch.int64)), name)
        return _checks.serve(weight, name)

    def write(self, weight: Int4Weight, settings: Settings, *, name: str) -> dict[str, Tensor]:
        """Integer grids only: no float offsets, code books or permutations, and K must be full groups."""
        weight.validate(name)
        _refuse_to_write(weight, name)
        tensors = {
            "weight_packed": _bits.pack_words(weight.codes, weight.bits),
            "weight_scale": weight.scales.clone(),
            "weight_shape": torch.tensor([weight.out_features, weight.in_features], dtype=torch.int64),
        }
        if weight.zeros is not None:
            tensors["weight_zero_point"] = _bits.pack_words(weight.zeros.t(), weight.bits).t().contiguous()
        return tensors

    def describe(self, written: Mapping[str, Settings], skipped: Iterable[str]) -> dict[str, Any]:
        """One group per kind of weight; the most frequent one targets every linear, the others name theirs."""
        kinds: dict[tuple[int, int, bool], list[str]] = {}
        for module, settings in written.items():
            kinds.setdefault((settings.bits, settings.group_size, settings.symmetric), []).append(module)
        ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
        groups = {}
        for index, ((bits, size, symmetric), modules) in enumerate(ordered):
            weights = {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if size == -1 else "group",
                "group_size": None if size == -1 else size,
                "dynamic": False,
            }
            targets = ["Linear"] if index == 0 else sorted(modules)
            groups[f"group_{index}"] = {"targets": targets, "weights": weights, "format": PACKED}
        return {
            "quant_method": "compressed-tensors",
            "format": PACKED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(skipped),
            "kv_cache_scheme": None,
        }

    def holds(self, module: nn.Module) -> bool:
        """A linear that compressed-tensors holds compressed."""
        weights = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        packed = getattr(module, "weight_packed", None)
        return weights is not None and isinstance(packed, Tensor) and packed.dtype == torch.int32

    def release(self, model: nn.Module) -> None:
        """The hook by which the first call would expand every weight."""
        hook = model.__dict__.pop("ct_decompress_hook", None)
        if hook is not None:
            hook.remove()

    def convert_module(self, module: nn.Module, *, name: str) -> Int4Weight | None:
        """See `Format.convert_module`. Such a linear keeps the tensors of the file as they are."""
        if not self.holds(module):
            return None
        weights: Any = module.quantization_scheme.weights  # type: ignore[union-attr]
        _checks.on_cpu(module.weight_packed, name)
        tensors = {key: value for key in self.suffixes(Settings()) if (value := getattr(module, key, None)) is not None}
        settings = _weight_settings(f"{name}.quantization_scheme", weights.model_dump(mode="json"))
        rows, inputs = (int(size) for size in tensors["weight_shape"])
        return self.read(tensors, settings, shape=(rows, inputs), name=name)


def _refuse_extra(config: Mapping[str, Any], key: str) -> None:
    value = config.get(key)
    if not value:
        return
    if key == "sparsity_config" and isinstance(value, Mapping) and value.get("format") in (None, "dense"):
        return
    if key == "transform_config" and isinstance(value, Mapping) and not value.get("config_groups"):
        return
    raise Int4Error(f"quantization_config.{key}: is not served, because ignoring it would change results")


def _group_settings(key: str, group: Any, outer: Any) -> Settings:
    where = f"quantization_config.config_groups.{key}"
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise Int4Error(f"{where}.weights: must be a table of settings")
    form = group.get("format") or outer
    if form != PACKED:
        raise Int4Error(f"{where}.format: {form!r} is not served; only {PACKED!r} is")
    for field in ("input_activations", "output_activations"):
        if group.get(field) is not None:
            raise Int4Error(f"{where}.{field}: quantized activations are not served; only weights may be quantized")
    return _weight_settings(f"{where}.weights", group["weights"])


def _weight_settings(where: str, weights: Mapping[str, Any]) -> Settings:
    try:
        bits = _checks.choice(weights, "num_bits", (4, 8))
        _checks.choice(weights, "type", ("int",), "int")
        strategy = _checks.choice(weights, "strategy", ("group", "channel", "tensor"))
        symmetric = _checks.flag(weights, "symmetric", True)
        _checks.choice(weights, "dynamic", (False,), False)
        order = _checks.choice(weights, "actorder", (None, False, "weight", "static", "group", "dynamic"), None)
        size = _checks.group_size(weights, "group_size") if strategy == "group" else -1
    except Int4Error as error:
        raise Int4Error(str(error).replace("quantization_config", where, 1)) from None
    return Settings(bits, size, symmetric, strategy, order in ("group", "dynamic"))


def _bits_of(packed: Tensor, settings: Settings, shape: tuple[int, int], name: str) -> int:
    rows, inputs = shape
    for bits in (settings.bits, 4, 8) if settings.mixed else (settings.bits,):
        if tuple(packed.shape) == (rows, _bits.words_for(inputs, bits)):
            return bits
    want = [rows, _bits.words_for(inputs, settings.bits)]
    raise Int4Error(f"{name}.weight_packed: must have shape {want}, got {list(packed.shape)}")


def _read_scales(tensors: Mapping[str, Tensor], rows: int, name: str) -> Tensor:
    scales = _checks.floats(tensors, "weight_scale", name)
    if scales.numel() == 1:  # one for the whole tensor
        return scales.reshape(1, 1).expand(rows, 1).contiguous()
    if scales.dim() == 1:
        scales = scales[:, None]
    if scales.dim() != 2 or scales.shape[0] != rows or scales.shape[1] == 0:
        raise Int4Error(f"{name}.weight_scale: must have shape [{rows}, groups], got {list(scales.shape)}")
    return scales.contiguous()


def _read_zeros(
    tensors: Mapping[str, Tensor], settings: Settings, bits: int, shape: tuple[int, int], name: str
) -> Tensor | None:
    if "weight_zero_point" not in tensors:
        if not (settings.symmetric or settings.mixed):
            raise Int4Error(f"{name}.weight_zero_point: is missing in the checkpoint, which is not symmetric")
        return None
    rows, groups = shape
    zeros = _checks.take(tensors, "weight_zero_point", name, (torch.int32, torch.int8))
    if zeros.dtype == torch.int32:
        _checks.take(tensors, "weight_zero_point", name, (torch.int32,), (_bits.words_for(rows, bits), groups))
        return _bits.trim(_bits.unpack_words(zeros.t(), bits), rows, name).t().contiguous()
    zeros = _checks.take(tensors, "weight_zero_point", name, (torch.int8,), shape)
    shifted = zeros.int() + (1 << (bits - 1))
    if bool((shifted < 0).any()) or bool((shifted >= 1 << bits).any()):
        raise Int4Error(f"{name}.weight_zero_point: holds values outside the range of {bits} bits")
    return shifted.to(torch.uint8)


def _refuse_to_write(weight: Int4Weight, name: str) -> None:
    reason = _checks.no_integer_grid(weight)
    if reason is None and weight.perm is not None:
        reason = "has a permutation of its inputs (act-order)"
    if reason is None and weight.group_size != -1 and weight.in_features % weight.group_size:
        reason = f"has {weight.in_features} inputs, which are no full groups of {weight.group_size}"
    if reason is not None:
        raise Int4Error(
            f"{name}: {reason}, which compressed-tensors cannot express; leave it in float (Int4Config.skip) or "
            "quantize it with integer or symmetric zero points and a group size that divides its inputs"
        )


FORMAT = CompressedTensors()
