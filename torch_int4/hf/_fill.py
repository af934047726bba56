"""The linears of a model that is being loaded: which become int4, and their weights, read one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4 import recipes
from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.formats import Format, Settings
from torch_int4.hf._keys import Names
from torch_int4.hf._source import Source
from torch_int4.nn.linear import Int4Linear
from torch_int4.patching.loading import PendingLinear, find_loadable, put_pending, replace
from torch_int4.patching.plan import Survey, offsets_of
from torch_int4.patching.report import PatchedLinear
from torch_int4.weights import panel_files as panels
from torch_int4.weights import types
from torch_int4.weights.arena import Arena, Size
from torch_int4.weights.canonical import Int4Weight
from torch_int4.weights.packed import Memory, PackedWeight
from torch_int4.weights.types import INT4


@dataclass
class Reading:
    """What has to be read for the linears of a model.

    Attributes:
        source: the checkpoint's tensors.
        pending: {module: its placeholder in the model}, in the order of the model.
        keys: {module: {suffix: name in the checkpoint}}; a float weight has the suffix "weight" alone.
        weight: makes the canonical weight of one linear from its tensors.
        size: the size that the packed weight of one linear is expected to have.
    """

    source: Source
    pending: dict[str, PendingLinear]
    keys: dict[str, dict[str, str]]
    weight: Callable[[PendingLinear, Mapping[str, Tensor]], Int4Weight]
    size: Callable[[PendingLinear], Size]

    def packed(self, name: str, memory: Memory | None) -> PackedWeight:
        """The weight of one linear, read and packed, in memory of its own unless some is given.

        Raises:
            Int4Error: naming the tensors and their file.
        """
        pending, keys = self.pending[name], self.keys[name]
        try:
            tensors = {suffix: self.source.read(key) for suffix, key in keys.items()}
            weight = self.weight(pending, tensors)
            del tensors
            return PackedWeight.pack(weight, memory)
        except (Int4Error, RuntimeError) as error:
            files = sorted({self.source.file(key) for key in keys.values()})
            raise Int4Error(f"{error} (in {', '.join(files)})") from error


def plan_quantization(survey: Survey, config: Int4Config, source: Source, names: Names) -> Reading:
    """How to read a checkpoint of float weights; linears that it cannot read one by one are left alone.

    Raises:
        Int4Error: the recipe needs more than the weight itself.
    """
    recipe = recipes.parse(config.recipe)
    if recipe.needs_calibration:
        raise Int4Error(
            f"Int4Config.recipe={config.recipe!r}: needs the model's own activations, so it cannot run while weights "
            "are loaded; load the model in float, patch(model, config, calibration=...), then save_pretrained"
        )
    model, kinds = survey.model, find_loadable(survey, config)
    wanted = {f"{name}.weight": name for name in kinds}
    found: dict[str, str] = {}
    for key in source:
        target = names.target(key) if key.endswith("weight") else None
        if target in wanted:
            found[wanted[target]] = key
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in found}  # type: ignore[arg-type]
    biases = {names.target(key) for key in source if key.endswith("bias")}
    for name, key in found.items():
        module: Any = model.get_submodule(name)
        if module.bias is not None and f"{name}.bias" not in biases:
            raise Int4Error(f"{name}.bias: is missing in {', '.join(source.files)}, which has {key}")
        if source.shape(key) != shapes[name]:
            raise Int4Error(
                f"{key} in {source.file(key)}: has shape {list(source.shape(key))}, but {name}.weight of the model is "
                f"{list(shapes[name])}; config.json and the weights do not belong together"
            )
    pending = put_pending(survey, {name: kind for name, kind in kinds.items() if name in found})

    def weight(place: PendingLinear, tensors: Mapping[str, Tensor]) -> Int4Weight:
        dense = tensors["weight"].to(place.dtype)
        if place.transposed:
            dense = dense.t()
        stage = recipe.rounding if place.kind is INT4 else recipes.get("rtn")
        made: Int4Weight = stage.quantize(dense, recipe.configure(config), bits=place.kind.bits, name=place.name)
        return made

    def size(place: PendingLinear) -> Size:
        return Size(*place.shape, config.group_size, place.kind.name, offsets_of(place.kind, config))

    return Reading(source, pending, {name: {"weight": found[name]} for name in pending}, weight, size)


def plan_reading(
    survey: Survey, form: Format, settings: Settings, source: Source, names: Names, config: Int4Config
) -> Reading:
    """How to read a quantized checkpoint. What lies on no grid of kernels is rounded again, by `config`.

    Raises:
        Int4Error: naming a quantized tensor without a linear, or a linear without a weight.
    """
    keys: dict[str, dict[str, str]] = {}
    known = {held.name for held in survey.linears.values()}
    where = ", ".join(source.files)
    try:
        quantized = form.linears(source, settings)
    except Int4Error as error:
        raise Int4Error(f"{error} (in {where})") from error
    for module, found in quantized.items():
        target = names.target(f"{module}.weight")
        name = target.removesuffix(".weight") if target is not None else None
        example = next(iter(found.values()))
        if name is None or name not in known:
            raise Int4Error(
                f"{example} in {source.file(example)}: is quantized, but the model has no linear {name or module!r} of "
                "its own to take it (a fused or an unknown layer)"
            )
        if name in keys:
            raise Int4Error(f"{example} in {source.file(example)}: is a second quantized weight of {name}")
        keys[name] = found
    missing = names.missing(survey.model, source, keys)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise Int4Error(f"{missing[0]}{more}: neither in float nor quantized in {where}; a shard may be missing")
    kind = types.find(settings.bits)
    assert kind is not None
    pending = put_pending(survey, dict.fromkeys(keys, kind))

    def weight(place: PendingLinear, tensors: Mapping[str, Tensor]) -> Int4Weight:
        if form.on_grid(settings):
            return form.read(tensors, settings, shape=place.shape, name=place.name)
        dense = form.read_dense(tensors, settings, shape=place.shape, name=place.name)
        made: Int4Weight = recipes.get("rtn").quantize(dense, config, bits=INT4.bits, name=place.name)
        return made

    def size(place: PendingLinear) -> Size:
        return Size(*place.shape, settings.group_size, place.kind.name, None if settings.symmetric else "integer")

    return Reading(source, pending, keys, weight, size)


def fill(model: nn.Module, reading: Reading, config: Int4Config, cached: str | None) -> list[PatchedLinear]:
    """Read every linear and put it into its place, one after the other.

    Those that the model's device map gives to the disk are mapped from a file instead of held in memory. With a cache
    of panels all of them are, and are neither read nor packed where the cache has them.

    Args:
        model: with its placeholders.
        reading: of the linears.
        config: of the model.
        cached: the key of the model's panels, where a cache is wanted.
    """
    pending = reading.pending
    folder = panels.cache_folder() if cached is not None else None
    if folder is not None:
        with contextlib.suppress(Int4Error):
            known = panels.map_file(folder / f"{cached}.safetensors")
            if set(known) == set(pending):
                return [_settle(model, place, known[name], config) for name, place in pending.items()]
    to_disk = {name for name in pending if folder is not None or _is_on_disk(model, name)}
    memory = Arena(reading.size(place) for name, place in pending.items() if name not in to_disk).take
    if not to_disk:
        return [_settle(model, place, reading.packed(name, memory), config) for name, place in pending.items()]
    file = None if folder is None else f"{cached}.safetensors"
    writer = panels.PanelWriter(folder or panels.default_folder(), file, to_disk)
    entries = {}
    try:
        for name, place in pending.items():
            made = reading.packed(name, None if name in to_disk else memory)
            if name in to_disk:
                writer.add(name, made)
            else:
                entries[name] = _settle(model, place, made, config)
            del made
        for name, mapped in writer.finish().items():
            entries[name] = _settle(model, pending[name], mapped, config)
    except OSError as error:
        raise panels.trouble(writer.folder, error) from error
    finally:
        writer.discard()
    return [entries[name] for name in pending]


def _is_on_disk(model: nn.Module, name: str) -> bool:
    devices: Mapping[str, Any] = getattr(model, "hf_device_map", None) or {}
    holders = [key for key in devices if key == "" or name == key or name.startswith(key + ".")]
    return bool(holders) and str(devices[max(holders, key=len)]) == "disk"


def _settle(model: nn.Module, pending: PendingLinear, weight: PackedWeight, config: Int4Config) -> PatchedLinear:
    """Put a packed weight, in a linear, into the place that was kept for it, with the bias that was loaded there."""
    bias = pending._parameters.get("bias")
    hook: Any = getattr(pending, "_hf_hook", None)
    if bias is not None and bias.is_meta and hook is not None:  # accelerate keeps it on the disk
        values = getattr(hook, "weights_map", None)
        bias = nn.Parameter(torch.as_tensor(values["bias"]).to(bias.dtype)) if values is not None else bias
    if bias is not None and bias.is_meta:
        raise Int4Error(f"{pending.name}.bias: was not loaded; the checkpoint lacks it")
    made = Int4Linear(weight, bias, compute=config.compute, dtype=pending.dtype)
    made.train(pending.training)
    replace(model, pending.name, made)
    return pending.entry(made)
