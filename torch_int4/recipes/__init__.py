"""Recipes: how the codes of weights are found. One stage per file; a recipe is stages joined by "+", or one name.

A stage is a module with some of these functions; what it does not have, it does not do:
    `prepare(model, options)` changes the float model as a whole (`parts/model.py`): it may rotate, prune, give modules
    new shapes. It runs before any data is captured, and again, on the float model, where an interrupted calibration
    goes on; so it gives the same model each time. A model of new shapes says so in `model.module.config`.
    `transform(block, options)` moves scales between the modules of a block (`parts/block.py`) and changes nothing that
    the float block computes. Several stages may; each gets all folds of the block.
    `round(block, options) -> {linear's name: Result}` rounds the linears of a block together. A `Result`
    (`weights/result.py`) is an `Int4Weight` and, where the stage declares some, extras: whatever the linear computes
    besides its product. A bare `Int4Weight` counts as a result without extras. Linears that are left out, those of 8
    bits for instance, are rounded to nearest.
    `quantize(weight, options, *, bits=4, name="weight", inputs=None) -> Int4Weight or Result` takes the place of
    `round` where rows `[N, K]` of any float dtype are rounded each by itself: `parts/compose.py` makes `round` of it.
    Without `NEEDS_INPUTS` such a stage serves models without data, and while they are loaded.
    `after(model, options)` works on the model with its int4 linears in place, before anything is fused: it may train
    biases and norms, set weights, extend linears. It changes the module that it is given, and needs no gradients of
    the caller. Where a calibration goes on it runs again.
    `check(options)` refuses options.
Of a recipe's stages the last one that can round does, and nothing else to blocks; all others have to do something else.
A stage that transforms stands before the rounding.

And constants: `ALONE = ("awq+rtn", {fields of the options})` says what the name means by itself where that is more than
the one stage; `NEEDS_INPUTS = True` asks for `inputs`, the statistics of what a weight is multiplied with;
`NEEDS_DATA = True` says that `prepare` or `after` run the model on calibration data; `FLOAT_TARGETS = True` asks for
the outputs of the float blocks; `LEARNS_SCALES = True` says that `round` uses the folds that no transform has used;
`EXTRAS = {"low_rank": LowRank}` declares the extras of its results, by which saved models are read again.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import Any

from torch_int4.config import WeightOptions, checks_recipes
from torch_int4.errors import Int4Error
from torch_int4.recipes.parts.recipe import Recipe

__all__ = ["Recipe", "available", "get", "parse", "rounds"]

NONE = "none"  # "none+gptq" is gptq without what the name means by itself


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


def rounds(stage: ModuleType) -> bool:
    """Whether a stage can round weights."""
    return hasattr(stage, "round") or hasattr(stage, "quantize")


@checks_recipes
def _check(options: WeightOptions) -> None:
    if not isinstance(options.recipe, str):
        raise Int4Error(f"Int4Config.recipe must be a name such as 'rtn' or 'awq+gptq'; got {options.recipe!r}")
    parse(options.recipe).check(options)


@functools.cache
def parse(recipe: str) -> Recipe:
    """The stages of a name such as "gptq", "awq" or "awq+gptq".

    Raises:
        Int4Error: an unknown stage, or some that do not go together.
    """
    alone: tuple[str, dict[str, Any]] = (recipe, {})
    if "+" not in recipe:
        alone = getattr(get(recipe), "ALONE", alone)
    names = alone[0].split("+")
    stages = tuple(get(name) for name in (names[1:] if names[0] == NONE and len(names) > 1 else names))
    rounding = _rounding(recipe, stages)
    for name, kind in Recipe(recipe, stages, rounding).extras.items():
        if any(getattr(stage, "EXTRAS", {}).get(name, kind) is not kind for stage in stages):
            raise Int4Error(f"Int4Config.recipe={recipe!r}: two of its stages give linears an extra {name!r}")
    return Recipe(recipe, stages, rounding, tuple(alone[1].items()))


def _rounding(recipe: str, stages: tuple[ModuleType, ...]) -> ModuleType:
    """The stage that rounds, of stages that go together."""
    where, able = f"Int4Config.recipe={recipe!r}", [stage for stage in stages if rounds(stage)]
    if not able:
        raise Int4Error(f"{where}: {_name(stages[-1])!r} rounds nothing; {_kinds()}")
    place = stages.index(able[-1])
    for index, stage in enumerate(stages):
        name = _name(stage)
        if stages.index(stage) != index:
            raise Int4Error(f"{where}: {name!r} stands in it twice")
        if index < place and not any(hasattr(stage, part) for part in ("prepare", "transform", "after")):
            raise Int4Error(f"{where}: {name!r} transforms nothing; {_kinds()}")
        if index > place and hasattr(stage, "transform"):
            raise Int4Error(f"{where}: {name!r} transforms what {_name(able[-1])!r} has rounded; put it before that")
        if index > place and not hasattr(stage, "after"):
            raise Int4Error(f"{where}: {name!r} does nothing after rounding; put it before {_name(able[-1])!r}")
    return able[-1]


def _name(stage: ModuleType) -> str:
    return stage.__name__.rpartition(".")[2]


def _kinds() -> str:
    stages = {name: get(name) for name in available()}
    transforms = [name for name, stage in stages.items() if hasattr(stage, "transform")]
    whole = [name for name, stage in stages.items() if hasattr(stage, "prepare") or hasattr(stage, "after")]
    kinds = f"transforms: {', '.join(transforms) or 'none'}; "
    kinds += f"of whole models: {', '.join(whole)}; " if whole else ""
    return kinds + f"roundings: {', '.join(name for name, stage in stages.items() if rounds(stage))}"
