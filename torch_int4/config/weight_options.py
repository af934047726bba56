"""The options that decide the bits of a quantized weight: the only ones that recipes see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch_int4.config import _checks
from torch_int4.errors import Int4Error

ZEROS = ("integer", "float")
PRESETS = ("light", "default", "best")
GROUP_SIZES = "a multiple of 32 up to 128, a multiple of 128 up to 1024, or -1 (one group per row)"


def is_group_size(value: Any) -> bool:
    """Whether kernels can serve groups of this many inputs."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    if value == -1:
        return True
    return (0 < value <= 128 and value % 32 == 0) or (128 < value <= 1024 and value % 128 == 0)


@dataclass(frozen=True)
class WeightOptions:
    """How the weight of a linear becomes codes and scales. `Int4Config` describes the fields.

    Raises:
        Int4Error: a value that is not accepted; the message names the field and the values that are.
    """

    recipe: str = "rtn"
    group_size: int = 32
    symmetric: bool = True
    zeros: str = "integer"
    clip: bool = False
    preset: str = "default"

    def __post_init__(self) -> None:
        if not is_group_size(self.group_size):
            raise Int4Error(f"Int4Config.group_size must be {GROUP_SIZES}; got {self.group_size!r}")
        _checks.choice(self, "zeros", ZEROS)
        _checks.choice(self, "preset", PRESETS)
        _checks.flag(self, "symmetric")
        _checks.flag(self, "clip")
        _check_recipe(self)


def _check_recipe(options: WeightOptions) -> None:
    if not _recipe_checks:
        raise Int4Error("Int4Config: no config can be made before torch_int4.recipes is imported, which checks recipes")
    for check in _recipe_checks:
        check(options)


_recipe_checks: list[Callable[[WeightOptions], None]] = []


def checks_recipes(check: Callable[[WeightOptions], None]) -> Callable[[WeightOptions], None]:
    """Decorates the function by which every new config has its recipe checked, with the options beside it.

    `torch_int4.recipes` registers it: recipes are files of that room, which this one does not import.
    """
    _recipe_checks[:] = [check]
    return check
