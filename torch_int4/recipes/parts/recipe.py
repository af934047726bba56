"""A recipe: stages in the order in which they run, of which one rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from torch_int4.config import WeightOptions
from torch_int4.errors import Int4Error
from torch_int4.weights.result import Extra, Result


@dataclass(frozen=True)
class Recipe:
    """The stages that a name means, and fields of the options that the method sets.

    Attributes:
        stages: the modules, in order.
        rounding: the one of them that rounds, and does nothing else to blocks.
    """

    name: str
    stages: tuple[ModuleType, ...]
    rounding: ModuleType
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def transforms(self) -> tuple[ModuleType, ...]:
        """The stages that transform blocks before they are rounded."""
        return tuple(s for s in self.stages if s is not self.rounding and hasattr(s, "transform"))

    @property
    def preparing(self) -> tuple[ModuleType, ...]:
        """The stages that change the float model as a whole."""
        return tuple(stage for stage in self.stages if hasattr(stage, "prepare"))

    @property
    def finishing(self) -> tuple[ModuleType, ...]:
        """The stages that work on the model once its linears are int4."""
        return tuple(stage for stage in self.stages if hasattr(stage, "after"))

    @property
    def extras(self) -> dict[str, type[Extra]]:
        """The extras that linears may compute besides their product, by name."""
        return {name: kind for stage in self.stages for name, kind in getattr(stage, "EXTRAS", {}).items()}

    @property
    def by_block(self) -> bool:
        """Whether the rounding works on whole blocks."""
        return hasattr(self.rounding, "round")

    @property
    def needs_inputs(self) -> bool:
        """Whether a stage looks at statistics of what linears are multiplied with."""
        return any(getattr(stage, "NEEDS_INPUTS", False) for stage in self.stages)

    @property
    def needs_calibration(self) -> bool:
        """Whether it needs data."""
        wants = self.needs_inputs or any(getattr(stage, "NEEDS_DATA", False) for stage in self.stages)
        return bool(self.transforms) or self.by_block or wants

    @property
    def needs_targets(self) -> bool:
        """Whether a stage compares with the float model's outputs."""
        return any(getattr(stage, "FLOAT_TARGETS", False) for stage in self.stages)

    @property
    def folds_scales(self) -> bool:
        """Whether scales may be moved between modules."""
        return bool(self.transforms) or getattr(self.rounding, "LEARNS_SCALES", False)

    def configure(self, options: WeightOptions) -> WeightOptions:
        """The options as the stages get them."""
        return replace(options, **dict(self.fields)) if self.fields else options

    def checked(self, result: Result, shape: Sequence[int], name: str) -> Result:
        """A result of a linear `[rows, inputs]` called `name`, if it is one.

        Raises:
            Int4Error: naming the linear: its weight or an extra has another size, or no stage declares an extra.
        """
        self.check_extras(result.extras, name)
        return result.check(shape, name)

    def check_extras(self, extras: Mapping[str, Extra], name: str) -> None:
        """Raise Int4Error, naming the linear `name`, for extras that no stage declares: files could not be read."""
        for extra, made in extras.items():
            if type(made) is not self.extras.get(extra):
                kind = type(made).__name__
                raise Int4Error(f"{name}: got an extra {extra!r} ({kind}) that no stage of {self.name!r} declares")

    def check(self, options: WeightOptions) -> None:
        """Raise Int4Error for options that a stage cannot serve."""
        for stage in self.stages:
            if hasattr(stage, "check"):
                stage.check(options)
