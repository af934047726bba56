"""The entry about int4 weights in `config.json`, and the state dict that goes with it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from torch_int4 import formats, recipes
from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.formats import Format, Settings
from torch_int4.nn.dense import linear_names
from torch_int4.nn.extended import extras_of
from torch_int4.nn.linear import Int4Linear, written_by

BLOCK = "torch_int4"  # in a `quantization_config`: the fields of the Int4Config
SOURCE = "source"  # in a `quantization_config` of ours: that of another tool, whose files are read
PREFERRED, FALLBACK = "compressed_tensors", "native"


@dataclass(frozen=True)
class Stored:
    """How the files of a checkpoint hold its int4 weights.

    Attributes:
        foreign: another tool chose which linears those are.
        extras: how many linears have each extra.
    """

    form: Format
    settings: Settings
    foreign: bool = False
    extras: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredConfig(Int4Config):
    """The config of a checkpoint, and how its files hold the weights. Transformers carries it to our quantizer.

    Attributes:
        stored: no option: it is neither compared, shown nor written.
    """

    stored: Stored | None = field(default=None, compare=False, repr=False)

    @property
    def plain(self) -> Int4Config:
        """The options alone."""
        return Int4Config(**{entry.name: getattr(self, entry.name) for entry in fields(Int4Config)})


# Transformers takes a config that a user gives for a quantized checkpoint only if the names of the two classes agree.
StoredConfig.__name__ = Int4Config.__name__


def parse(data: Mapping[str, Any]) -> Int4Config:
    """The config of a `quantization_config` that is ours: a `StoredConfig` where it says how files hold the weights.

    Raises:
        Int4Error: naming a field that is unknown or not accepted.
    """
    block = data.get(BLOCK)
    if block is None:  # what a user gives as a dict, to quantize with
        return Int4Config.from_dict(data)
    if not isinstance(block, Mapping):
        raise Int4Error(f"quantization_config.{BLOCK}: must be a table of settings, got {type(block).__name__}")
    config = Int4Config.from_dict(block)
    described = data.get(SOURCE, {key: value for key, value in data.items() if key != BLOCK})
    form = formats.find(described)
    stored = Stored(form, form.settings(described), SOURCE in data, _extras(form, described, config))
    return StoredConfig(**{entry.name: getattr(config, entry.name) for entry in fields(config)}, stored=stored)


def _extras(form: Format, described: Mapping[str, Any], config: Int4Config) -> dict[str, int]:
    """How many linears have each extra, if the recipe that gave them is one of ours."""
    counts, known = form.extras(described), recipes.parse(config.recipe).extras
    unknown = [name for name in counts if name not in known]
    if unknown:
        raise Int4Error(
            f"quantization_config.extras: {', '.join(unknown)} is none of recipe={config.recipe!r} here; another "
            "version of torch_int4 wrote this"
        )
    return counts


def wrap(source: Mapping[str, Any], config: Int4Config) -> dict[str, Any]:
    """A `quantization_config` by which we read the files of another tool."""
    return {"quant_method": Int4Config.quant_method, SOURCE: dict(source), BLOCK: config.to_dict()}


def state_of(model: nn.Module, config: Int4Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a model in the form that goes into files, and its `quantization_config`.

    That is compressed-tensors, which others read too, when it can express every linear; otherwise our own form, with
    a warning that names the linear that is to blame.
    """
    try:
        return _write(model, config, formats.get(PREFERRED))
    except Int4Error as error:
        reason = str(error).split(";")[0]
        warnings.warn(
            f"{reason}. The checkpoint is saved in torch_int4's own form, which only torch_int4 loads", stacklevel=4
        )
    return _write(model, config, formats.get(FALLBACK))


def _write(model: nn.Module, config: Int4Config, form: Format) -> tuple[dict[str, Tensor], dict[str, Any]]:
    written: dict[str, Settings] = {}

    def tensors(linear: Int4Linear, name: str) -> dict[str, Tensor]:
        weight = linear.to_weight()
        written[name] = form.settings_for(weight)
        return form.write(weight, written[name], name=name)

    with written_by(tensors):
        state = model.state_dict()
    description = form.describe(written, linear_names(model))
    counts = Counter(extra for name in written for extra in extras_of(model.get_submodule(name)))
    if counts:
        description |= form.describe_extras(counts)
    return state, {**description, BLOCK: config.to_dict()}
