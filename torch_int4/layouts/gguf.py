"""How GGUF files keep a family of models: data, which a family's file sets as `GGUF`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# of each head row 2i is row i of its first half, and row 2i + 1 of its second, as llama.cpp rotates neighbours
PAIRS = "pairs"
HEADS = "heads"  # all q, all k, all v, where the model has q, k and v of one head after the other


@dataclass(frozen=True)
class GgufLayout:
    """What llama.cpp's converter makes of a family (its `conversion/`), beyond what it makes of every family.

    Attributes:
        architecture: the value of `general.architecture`. Several families may share one.
        needs: metadata that files of this family have, without the architecture's name in front.
        lacks: metadata that they have not, or whose value is 0.
        fields: names in the model's config for metadata (`hf/gguf_facts.py` has those of all families), or None for
            what the config does not say.
        settings: what the config says and no metadata does.
        rows: {tensor of a layer: order of its rows}, PAIRS or HEADS.
        norms_hold_one: whether norms are stored as the factor, and the model has the factor less one.
        names: {parameter of a layer: tensor of a layer}, for what the package gguf does not know by its name in
            transformers.
    """

    architecture: str
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    fields: Mapping[str, str | None] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    norms_hold_one: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
