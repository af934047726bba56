"""What `patch` needs to know about a family of models: data, one file per family."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..attention_layout import AttentionLayout
from ..block_layout import BlockLayout
from ..errors import Int4Error
from ..folding import ScaleFold

_NOT_FAMILIES = ("families", "patcher")  # and files whose name starts with an underscore


@dataclass(frozen=True)
class Family:
    """Facts about the modules of a family. A family file sets `FAMILY = Family(...)`.

    Attributes:
        shared_inputs: names of linears that are given the same input, and therefore can run as one operator
            call. The names are relative to a module that holds them; a module without them is passed over.
        not_shared_beside: names of modules that, beside such linears, give them different inputs.
        attention: where attention modules keep what fused attention needs; None leaves them alone.
        blocks: what decoder layers compute, one entry for each kind of them; others are left alone.
        folds: scales that recipes may move between modules; they are checked on data before they are used.
        head: path of the projection onto the vocabulary in a model that has no `get_output_embeddings()`.
    """

    shared_inputs: tuple[tuple[str, ...], ...] = ()
    not_shared_beside: tuple[str, ...] = ()
    attention: AttentionLayout | None = None
    blocks: tuple[BlockLayout, ...] = ()
    folds: tuple[ScaleFold, ...] = ()
    head: str = "lm_head"


def available() -> tuple[str, ...]:
    """Names of the families that have a file, the generic one included."""
    names = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return tuple(sorted(name for name in names if name not in _NOT_FAMILIES and not name.startswith("_")))


@functools.cache
def find(model_type: str | None) -> Family:
    """The family of a Hugging Face `model_type`, or the generic one where there is no file for it."""
    name = (model_type or "generic").replace("-", "_")
    return _load(name if name in available() else "generic")


def resolve(family: Family | str | None) -> Family | None:
    """What the user gave as `family`.

    Raises:
        Int4Error: a name without a file, or another type.
    """
    if family is None or isinstance(family, Family):
        return family
    if not isinstance(family, str) or family not in available():
        raise Int4Error(f"unknown family {family!r}; there are: {', '.join(available())}. Or pass a Family")
    return _load(family)


def of_modules(model: nn.Module, given: Family | None) -> dict[int, Family]:
    """The family of each module of a model, by `id`: that of the nearest module above it whose config says
    so.

    So the Llama inside a model of pictures and text is treated as a Llama.
    """
    result: dict[int, Family] = {}

    def visit(module: nn.Module, inherited: Family) -> None:
        model_type = _model_type(module)
        family = find(model_type) if given is None and model_type is not None else inherited
        if id(module) not in result:
            result[id(module)] = family
            for child in module.children():
                visit(child, family)

    visit(model, given or find(None))
    return result


def _model_type(module: nn.Module) -> str | None:
    config: Any = getattr(module, "config", None)
    model_type = getattr(config, "model_type", None)
    return model_type if isinstance(model_type, str) and model_type else None


def _load(name: str) -> Family:
    family = importlib.import_module(f"{__package__}.{name}").FAMILY
    if not isinstance(family, Family):
        raise Int4Error(f"patches/{name}.py: FAMILY must be a Family, got {type(family).__name__}")
    return family
