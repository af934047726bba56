"""The methods that the report compares: float in two types, our recipes, and peers that are installed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch_int4 import recipes
from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.evals.report import peers

KINDS = ("float", "int4", "peer")


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        label: what the table calls it.
        kind: "float", "int4" (ours) or "peer".
        options: {"dtype": …} for float, the fields of `Int4Config` for ours, {"peer": file name} for peers.
    """

    label: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


def methods(
    configs: Sequence[Int4Config] | None = None, *, with_peers: bool = True, calibrated: bool = False
) -> list[Method]:
    """Rows in order; the first is float32, which the others are compared with.

    Args:
        configs: ours; None for every recipe with groups of 32 and of 128.
        with_peers: also whoever is installed.
        calibrated: of every recipe, also those that calibrate, which takes minutes each.
    """
    if configs is None:
        names = [name for name in recipes.available() if calibrated or not recipes.parse(name).needs_calibration]
        configs = [_usual(name, size) for name in names for size in (32, 128)]
    rows = [Method("float32", "float", {"dtype": "float32"}), Method("bfloat16", "float", {"dtype": "bfloat16"})]
    rows += [Method(label(config), "int4", dataclasses.asdict(config)) for config in configs]
    if with_peers:
        found = peers.known().items()
        rows += [Method(peer.LABEL, "peer", {"peer": name}) for name, peer in found if peer.missing() is None]
    return rows


def _usual(recipe: str, group_size: int) -> Int4Config:
    """The default config of a recipe; with float minimums where it takes nothing else."""
    try:
        return Int4Config(recipe=recipe, group_size=group_size)
    except Int4Error:
        return Int4Config(recipe=recipe, group_size=group_size, symmetric=False, zeros="float")


def label(config: Int4Config) -> str:
    """A config as a row is called: recipe, group, and every field that differs from the default."""
    usual = dataclasses.asdict(Int4Config())
    other = [
        f"{name}={value}"
        for name, value in dataclasses.asdict(config).items()
        if name not in ("recipe", "group_size") and value != usual[name]
    ]
    size = "row" if config.group_size == -1 else f"g{config.group_size}"
    return " ".join([config.recipe, size, *other])


def missing_peers() -> list[str]:
    """Packages that would add a row."""
    return [wanted for peer in peers.known().values() if (wanted := peer.missing()) is not None]
