"""The linears of a model that is being loaded: which become int4, and their weights, read one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4 import recipes
from torch_int4.checkpoint.stored import Stored
from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.formats.parts.files import Checkpoint
from torch_int4.hf._extras import StoredExtras
from torch_int4.hf._keys import Names
from torch_int4.nn.extended import extend
from torch_int4.nn.linear import Int4Linear
from torch_int4.patching.loading import PendingLinear, find_loadable, put_pending, replace
from torch_int4.patching.plan import Survey, offsets_of
from torch_int4.patching.report import PatchedLinear
from torch_int4.weights import panel_files as panels
from torch_int4.weights import types
from torch_int4.weights.arena import Arena, Size
from torch_int4.weights.packed import Memory, PackedWeight
from torch_int4.weights.result import Extra, Result
from torch_int4.weights.types import INT4


@dataclass
class Reading:
    """The tensors to be read for the linears of a model.

    Attributes:
        source: the checkpoint's tensors.
        pending: {module: its placeholder in the model}, in the order of the model.
        keys: {module: {suffix: name in the checkpoint}}; a float weight has the suffix "weight" alone.
        result: makes the canonical weight of one linear from its tensors; extras too where it is rounded.
        size: the size that the packed weight of one linear is expected to have.
        stored: the extras of linears whose weights are stored.
    """

    source: Checkpoint
    pending: dict[str, PendingLinear]
    keys: dict[str, dict[str, str]]
    result: Callable[[PendingLinear, Mapping[str, Tensor]], Result]
    size: Callable[[PendingLinear], Size]
    stored: StoredExtras | None = None
    _rounded: dict[str, Mapping[str, Extra]] = field(default_factory=dict)

    def packed(self, name: str, memory: Memory | None) -> PackedWeight:
        """The weight of one linear without its extras, read and packed, in memory of its own unless some is given.

        Raises:
            Int4Error: naming the tensors and their file.
        """
        pending, keys = self.pending[name], self.keys[name]
        try:
            tensors = {suffix: self.source.read(key) for suffix, key in keys.items() if suffix != "bias"}
            result = self.result(pending, tensors)
            del tensors
            self._rounded[name] = result.extras
            return PackedWeight.pack(result.weight, memory)
        except (Int4Error, RuntimeError) as error:
            files = sorted({self.source.file(key) for key in keys.values()})
            raise Int4Error(f"{error} (in {', '.join(files)})") from error

    def extras(self, name: str) -> Mapping[str, Extra]:
        """The extras of a linear: those that are stored, or that `linear` has found."""
        if self.stored is not None:
            return self.stored.read(name, self.source)
        return self._rounded.pop(name, {})

    def all_keys(self) -> list[str]:
        """Every tensor of the checkpoint that is read here, by its name there."""
        stored = [] if self.stored is None else self.stored.all_keys()
        return [self.source.stored_name(key) for found in self.keys.values() for key in found.values()] + stored

    def take_biases(self) -> None:
        """Takes the biases that transformers cannot read, as they lie in tensors of all experts, upon itself."""
        for name, place in self.pending.items():
            key = f"{name}.bias"
            if place._parameters.get("bias") is not None and self.source.stored_name(key) != key:
                self.keys[name]["bias"] = key
                place.register_parameter("bias", None)

    def bias(self, name: str) -> nn.Parameter | None:
        """The bias of a linear, as the checkpoint or the model has it by now."""
        place, key = self.pending[name], self.keys[name].get("bias")
        if key is None:
            return place._parameters.get("bias")
        return nn.Parameter(self.source.read(key).to(place.dtype), requires_grad=False)


def plan_quantization(survey: Survey, config: Int4Config, source: Checkpoint, names: Names) -> Reading:
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
    if recipe.preparing or recipe.finishing:
        raise Int4Error(
            f"Int4Config.recipe={config.recipe!r}: works on the model as a whole, so it cannot run while weights are "
            "loaded; load the model in float, patch(model, config), then save_pretrained"
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

    def result(place: PendingLinear, tensors: Mapping[str, Tensor]) -> Result:
        dense = tensors["weight"].to(place.dtype)
        if place.transposed:
            dense = dense.t()
        stage = recipe.rounding if place.kind is INT4 else recipes.get("rtn")
        made = stage.quantize(dense, recipe.configure(config.weights), bits=place.kind.bits, name=place.name)
        return recipe.checked(Result.of(made), place.shape, place.name)

    def size(place: PendingLinear) -> Size:
        return Size(*place.shape, config.group_size, place.kind.name, offsets_of(place.kind, config))

    reading = Reading(source, pending, {name: {"weight": found[name]} for name in pending}, result, size)
    reading.take_biases()
    return reading


def plan_reading(survey: Survey, how: Stored, source: Checkpoint, names: Names, config: Int4Config) -> Reading:
    """How to read a quantized checkpoint. What lies on no grid of kernels is rounded again, by `config`.

    Raises:
        Int4Error: naming a quantized tensor without a linear, or a linear without a weight.
    """
    form, settings = how.form, how.settings
    keys: dict[str, dict[str, str]] = {}
    known = {held.name for held in survey.linears.values()}
    where = ", ".join(source.files)
    try:
        quantized = form.linears(source, settings)
    except Int4Error as error:
        raise Int4Error(f"{error} (in {where})") from error
    for module, found in quantized.items():
        name = names.linear(module)
        example = next(iter(found.values()))
        if name is not None and names.is_of_another_head(survey.model, name):
            continue  # as transformers does, which says so
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

    def result(place: PendingLinear, tensors: Mapping[str, Tensor]) -> Result:
        if form.on_grid(settings):
            return Result(form.read(tensors, settings, shape=place.shape, name=place.name))
        dense = form.read_dense(tensors, settings, shape=place.shape, name=place.name)
        return Result(recipes.get("rtn").quantize(dense, config.weights, bits=INT4.bits, name=place.name))

    def size(place: PendingLinear) -> Size:
        return Size(*place.shape, settings.group_size, place.kind.name, None if settings.symmetric else "integer")

    shapes = {name: place.shape for name, place in pending.items()}
    kinds = recipes.parse(config.recipe).extras
    stored = StoredExtras.find(source, names.target, shapes, kinds, how.extras) if how.extras else None
    reading = Reading(source, pending, keys, result, size, stored)
    reading.take_biases()
    return reading


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
                return [_settle(model, reading, known[name], name, config) for name in pending]
    to_disk = {name for name in pending if folder is not None or _is_on_disk(model, name)}
    memory = Arena(reading.size(place) for name, place in pending.items() if name not in to_disk).take
    if not to_disk:
        return [_settle(model, reading, reading.packed(name, memory), name, config) for name in pending]
    file = None if folder is None else f"{cached}.safetensors"
    writer = panels.PanelWriter(folder or panels.default_folder(), file, to_disk)
    entries = {}
    try:
        for name in pending:
            made = reading.packed(name, None if name in to_disk else memory)
            if name in to_disk:
                writer.add(name, made)
            else:
                entries[name] = _settle(model, reading, made, name, config)
            del made
        for name, mapped in writer.finish().items():
            entries[name] = _settle(model, reading, mapped, name, config)
    except OSError as error:
        raise panels.trouble(writer.folder, error) from error
    finally:
        writer.discard()
    return [entries[name] for name in pending]


def _is_on_disk(model: nn.Module, name: str) -> bool:
    devices: Mapping[str, Any] = getattr(model, "hf_device_map", None) or {}
    holders = [key for key in devices if key == "" or name == key or name.startswith(key + ".")]
    return bool(holders) and str(devices[max(holders, key=len)]) == "disk"


def _settle(model: nn.Module, reading: Reading, weight: PackedWeight, name: str, config: Int4Config) -> PatchedLinear:
    """Put a packed weight, in a linear with its extras, into the place that was kept for it, with the bias there."""
    pending = reading.pending[name]
    bias = reading.bias(name)
    hook: Any = getattr(pending, "_hf_hook", None)
    if bias is not None and bias.is_meta and hook is not None:  # accelerate keeps it on the disk
        values = getattr(hook, "weights_map", None)
        bias = nn.Parameter(torch.as_tensor(values["bias"]).to(bias.dtype)) if values is not None else bias
    if bias is not None and bias.is_meta:
        raise Int4Error(f"{pending.name}.bias: was not loaded; the checkpoint lacks it")
    made = Int4Linear(weight, bias, compute=config.compute, dtype=pending.dtype)
    extend(made, reading.extras(name))
    made.train(pending.training)
    replace(model, pending.name, made)
    return pending.entry(made)
