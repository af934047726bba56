"""The facts about a family of models that the patcher needs: data."""

from __future__ import annotations

from dataclasses import dataclass

from torch_int4.layouts.attention import AttentionLayout
from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.scales import ScaleFold


@dataclass(frozen=True)
class Family:
    """Facts about the modules of a family. A family file sets `FAMILY = Family(...)`.

    Attributes:
        shared_inputs: names of linears that are given the same input, and therefore can run as one operator
            call. The names are relative to a module that holds them; a module without them is passed over.
        not_shared_beside: names of modules that, beside such linears, give them different inputs.
        attention: where attention modules keep what fused attention needs, several of them where versions of
            transformers differ; None leaves them alone.
        blocks: what decoder layers compute, one entry for each kind of them; others are left alone.
        folds: scales that recipes may move between modules; they are checked on data before they are used.
        head: path of the projection onto the vocabulary in a model that has no `get_output_embeddings()`.
    """

    shared_inputs: tuple[tuple[str, ...], ...] = ()
    not_shared_beside: tuple[str, ...] = ()
    attention: AttentionLayout | tuple[AttentionLayout, ...] | None = None
    blocks: tuple[BlockLayout, ...] = ()
    folds: tuple[ScaleFold, ...] = ()
    head: str = "lm_head"

    @property
    def attentions(self) -> tuple[AttentionLayout, ...]:
        """The layouts of attention modules."""
        given = self.attention
        return () if given is None else given if isinstance(given, tuple) else (given,)
