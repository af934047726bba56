"""Recipes: how the codes of a weight are found. One stage per file; a recipe is "transform+rounding", or one name.

A stage is a module with one or two of these functions:
    `transform(block, config)` moves scales between the modules of a block and changes nothing that the float block
    computes;
    `quantize(weight, config, *, bits=4, name="weight", inputs=None) -> Int4Weight` rounds the rows of a weight
    `[N, K]` of any float dtype, each by itself; with `NEEDS_INPUTS = True` it cannot do without `inputs`, the
    statistics of what the weight is multiplied with;
    `quantize_block(block, config) -> {linear's name: Int4Weight}` rounds the linears of a block together.
And constants: `ALONE = ("transform", "rounding", {config fields})` says what the name means by itself where that is
more than the one stage; `LEARNS_SCALES = True` says that `quantize_block` uses the folds that no transform has used;
`FLOAT_TARGETS = True` asks for the float model's outputs; `check(config)` refuses configs.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from torch_int4.config import WeightOptions, checks_recipes
from torch_int4.errors import Int4Error

NONE = "none"


@dataclass(frozen=True)
class Recipe:
    """A transform (or None), a rounding, and fields of the config that the method sets."""

    name: str
    transform: ModuleType | None
    rounding: ModuleType
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def stages(self) -> tuple[ModuleType, ...]:
        """The modules, in the order in which they run."""
        return tuple(stage for stage in (self.transform, self.rounding) if stage is not None)

    @property
    def by_block(self) -> bool:
        """Whether the rounding works on whole blocks."""
        return hasattr(self.rounding, "quantize_block")

    @property
    def needs_calibration(self) -> bool:
        """Whether it needs data."""
        return self.transform is not None or self.by_block or getattr(self.rounding, "NEEDS_INPUTS", False)

    @property
    def folds_scales(self) -> bool:
        """Whether scales may be moved between modules."""
        return self.transform is not None or getattr(self.rounding, "LEARNS_SCALES", False)

    @property
    def needs_targets(self) -> bool:
        """Whether a stage compares with the float model's outputs."""
        return any(getattr(stage, "FLOAT_TARGETS", False) for stage in self.stages)

    def configure(self, options: WeightOptions) -> WeightOptions:
        """The options as the stages get them."""
        return replace(options, **dict(self.fields)) if self.fields else options

    def check(self, options: WeightOptions) -> None:
        """Raise Int4Error for options that a stage cannot serve."""
        for stage in self.stages:
            if hasattr(stage, "check"):
                stage.check(options)


def available() -> tuple[str, ...]:
    """The names of all stages, in alphabetical order."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg))


def get(name: str) -> ModuleType:
    """The stage of that name.

    Raises:
        Int4Error: there is none; the message lists those that exist.
    """
    if name not in available():
        names = ", ".join(repr(stage) for stage in available())
        raise Int4Error(
            f"unknown recipe {name!r} for Int4Config.recipe; there are {names}, and pairs such as 'awq+gptq'"
        )
    return importlib.import_module(f"{__name__}.{name}")


@checks_recipes
def _check(options: WeightOptions) -> None:
    if not isinstance(options.recipe, str):
        raise Int4Error(f"Int4Config.recipe must be a name such as 'rtn' or 'awq+gptq'; got {options.recipe!r}")
    parse(options.recipe).check(options)


@functools.cache
def parse(recipe: str) -> Recipe:
    """What a name such as "gptq", "awq" or "awq+gptq" means.

    Raises:
        Int4Error: an unknown stage, or two that do not go together.
    """
    first, plus, second = recipe.partition("+")
    if not plus:
        alone: tuple[str, str, dict[str, Any]] = getattr(get(first), "ALONE", (NONE, first, {}))
        return _pair(recipe, alone[0], alone[1], tuple(alone[2].items()))
    return _pair(recipe, first, second, ())


def _pair(recipe: str, transform: str, rounding: str, fields: tuple[tuple[str, Any], ...]) -> Recipe:
    before = None if transform == NONE else get(transform)
    after = get(rounding)
    if before is not None and not hasattr(before, "transform"):
        raise Int4Error(f"Int4Config.recipe={recipe!r}: {transform!r} transforms nothing; {_kinds()}")
    if not (hasattr(after, "quantize") or hasattr(after, "quantize_block")):
        raise Int4Error(f"Int4Config.recipe={recipe!r}: {rounding!r} rounds nothing; {_kinds()}")
    return Recipe(recipe, before, after, fields)


def _kinds() -> str:
    stages = {name: get(name) for name in available()}
    transforms = [name for name, stage in stages.items() if hasattr(stage, "transform")]
    roundings = [n for n, stage in stages.items() if hasattr(stage, "quantize") or hasattr(stage, "quantize_block")]
    return f"transforms: {', '.join(transforms) or 'none'}; roundings: {', '.join(roundings)}"
