"""Scales that may move between a module and the linears that read its output: data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScaleFold:
    """Which module's output can be divided by a scale per channel, and which linears are multiplied instead.

    All names are relative to a module that holds them, such as a decoder layer; where one is missing, the fact does
    not apply. Of several facts about one source or target the first that holds is used.

    Attributes:
        source: a norm, or a linear whose output reaches the targets through nothing but sums over tokens and
            products with values that do not depend on it (value -> attention -> output projection, or the factor
            of a gated MLP that has no activation).
        targets: every linear that reads that output.
        head_dim: attribute with the size of a head, where key and value heads are fewer than query heads.
        fused: the source gives query, key and value, per kv head its query heads, the key and the value.
    """

    source: str
    targets: tuple[str, ...]
    head_dim: str | None = None
    fused: bool = False
