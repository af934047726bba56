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
from torch_int4.patching.loading import PendingLinear, all_linears, find_loadable, put_pending, replace
from torch_int4.patching.report import PatchedLinear
from torch_int4.weights import panel_files as panels
from torch_int4.weights.result import Extra, Result


@dataclass
class Plan:
    """What has to be read for the linears of a model.

    Attributes:
        source: the checkpoint's tensors.
        pending: {module: its placeholder in the model}.
        keys: {module: {suffix: name in the checkpoint}}; a float weight has the suffix "weight" alone.
        result: makes the canonical weight of one linear from its tensors; extras too where it is rounded.
        stored: the extras of linears whose weights are stored.
    """

    source: Checkpoint
    pending: dict[str, PendingLinear]
    keys: dict[str, dict[str, str]]
    result: Callable[[PendingLinear, Mapping[str, Tensor]], Result]
    stored: StoredExtras | None = None
    _rounded: dict[str, Mapping[str, Extra]] = field(default_factory=dict)

    def linear(self, name: str) -> Int4Linear:
        """One linear, read and packed, without its bias and its extras.

        Raises:
            Int4Error: naming the tensors and their file.
        """
        pending, keys = self.pending[name], self.keys[name]
        try:
            tensors = {suffix: self.source.read(key) for suffix, key in keys.items()}
            result = self.result(pending, tensors)
            del tensors
            self._rounded[name] = result.extras
            return Int4Linear.from_weight(result.weight, dtype=pending.dtype)
        except (Int4Error, RuntimeError) as error:
            files = sorted({self.source.file(key) for key in keys.values()})
            raise Int4Error(f"{error} (in {', '.join(files)})") from error

    def extras(self, name: str) -> Mapping[str, Extra]:
        """The extras of a linear: those that are stored, or that `linear` has found."""
        if self.stored is not None:
            return self.stored.read(name, self.source)
        return self._rounded.pop(name, {})

    def all_keys(self) -> list[str]:
        """Every tensor of the checkpoint that the plan reads."""
        stored = [] if self.stored is None else self.stored.all_keys()
        return [key for found in self.keys.values() for key in found.values()] + stored


def plan_quantization(model: nn.Module, config: Int4Config, source: Checkpoint, names: Names) -> Plan:
    """A plan for a checkpoint of float weights; linears that it cannot read one by one are left alone.

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
    bits = find_loadable(model, config)
    wanted = {f"{name}.weight": name for name in bits}
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
    pending = put_pending(model, {name: bits[name] for name in bits if name in found})

    def result(place: PendingLinear, tensors: Mapping[str, Tensor]) -> Result:
        dense = tensors["weight"].to(place.dtype)
        if place.transposed:
            dense = dense.t()
        stage = recipe.rounding if place.bits == 4 else recipes.get("rtn")
        made = stage.quantize(dense, recipe.configure(config.weights), bits=place.bits, name=place.name)
        return recipe.checked(Result.of(made), place.shape, place.name)

    return Plan(source, pending, {name: {"weight": found[name]} for name in pending}, result)


def plan_reading(model: nn.Module, how: Stored, source: Checkpoint, names: Names, config: Int4Config) -> Plan:
    """A plan for a checkpoint that is quantized already. What lies on no grid of kernels is rounded again, by `config`.

    Raises:
        Int4Error: naming a quantized tensor without a linear, or a linear without a weight.
    """
    form, settings = how.form, how.settings
    keys: dict[str, dict[str, str]] = {}
    known = set(all_linears(model))
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
    missing = names.missing(model, source, keys)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise Int4Error(f"{missing[0]}{more}: neither in float nor quantized in {where}; a shard may be missing")
    pending = put_pending(model, dict.fromkeys(keys, settings.bits))

    def result(place: PendingLinear, tensors: Mapping[str, Tensor]) -> Result:
        if form.on_grid(settings):
            return Result(form.read(tensors, settings, shape=place.shape, name=place.name))
        dense = form.read_dense(tensors, settings, shape=place.shape, name=place.name)
        return Result(recipes.get("rtn").quantize(dense, config.weights, bits=4, name=place.name))

    shapes = {name: place.shape for name, place in pending.items()}
    kinds = recipes.parse(config.recipe).extras
    stored = StoredExtras.find(source, names.target, shapes, kinds, how.extras) if how.extras else None
    return Plan(source, pending, keys, result, stored)


def fill(model: nn.Module, plan: Plan, config: Int4Config, cached: str | None) -> list[PatchedLinear]:
    """Put every linear of a plan into its place, one after the other.

    Those that the model's device map gives to the disk are mapped from a file instead of held in memory. With a cache
    of panels all of them are, and are neither read nor packed where the cache has them.

    Args:
        model: with its placeholders.
        plan: of the linears.
        config: of the model.
        cached: the key of the model's panels, where a cache is wanted.
    """
    folder = panels.cache_folder() if cached is not None else None
    if folder is not None:
        with contextlib.suppress(Int4Error):
            known = panels.map_file(folder / f"{cached}.safetensors")
            if set(known) == set(plan.pending):
                return [_settle(model, plan, known[name], name, config) for name in plan.pending]
    to_disk = {name for name in plan.pending if folder is not None or _is_on_disk(model, name)}
    if not to_disk:
        return [_settle(model, plan, plan.linear(name), name, config) for name in plan.pending]
    return _fill_through_file(
        model,
        plan,
        config,
        to_disk,
        panels.PanelWriter(
            folder or panels.default_folder(), None if folder is None else f"{cached}.safetensors", to_disk
        ),
    )


def _fill_through_file(
    model: nn.Module, plan: Plan, config: Int4Config, to_disk: set[str], writer: panels.PanelWriter
) -> list[PatchedLinear]:
    entries = {}
    try:
        for name in plan.pending:
            made = plan.linear(name)
            if name in to_disk:
                writer.add(name, made)
            else:
                entries[name] = _settle(model, plan, made, name, config)
            del made
        for name, mapped in writer.finish().items():
            entries[name] = _settle(model, plan, mapped, name, config)
    except OSError as error:
        raise panels.trouble(writer.folder, error) from error
    finally:
        writer.discard()
    return [entries[name] for name in plan.pending]


def _is_on_disk(model: nn.Module, name: str) -> bool:
    devices: Mapping[str, Any] = getattr(model, "hf_device_map", None) or {}
    holders = [key for key in devices if key == "" or name == key or name.startswith(key + ".")]
    return bool(holders) and str(devices[max(holders, key=len)]) == "disk"


def _settle(model: nn.Module, plan: Plan, made: Int4Linear, name: str, config: Int4Config) -> PatchedLinear:
    """Put a packed linear into the place that was kept for it, with its extras and the bias that was loaded there."""
    pending = plan.pending[name]
    extend(made, plan.extras(name))
    bias = pending._parameters.get("bias")
    hook: Any = getattr(pending, "_hf_hook", None)
    if bias is not None and bias.is_meta and hook is not None:  # accelerate keeps it on the disk
        values = getattr(hook, "weights_map", None)
        bias = nn.Parameter(torch.as_tensor(values["bias"]).to(bias.dtype)) if values is not None else bias
    if bias is not None and bias.is_meta:
        raise Int4Error(f"{pending.name}.bias: was not loaded; the checkpoint lacks it")
    made.register_parameter("bias", bias)
    made.compute, made.compute_dtype = config.compute, pending.dtype
    made.train(pending.training)
    replace(model, pending.name, made)
    return pending.entry(made)
