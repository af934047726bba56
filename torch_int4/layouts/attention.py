"""The facts about a family's attention modules that fused attention needs: data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class AttentionLayout:
    """Where the attention modules of a family keep things. Fields that are no names say so.

    Attributes:
        forwards: fingerprints of the `forward` that this is true of (see support/forwards.py). Modules that compute
            anything else are left alone.
        when: (attribute of the module, such as "config.clip_qkv", value) of those that this is true of.
        projections: of the linears for query, key and value; or of the single one that gives all three, per kv head
            its query heads, the key and the value.
        concatenated: whether that single one gives all queries, then all keys, then all values.
        gated: whether the linear for queries gives, per head, the query and a gate, by whose sigmoid what attention
            gives is multiplied.
        output: of the output projection.
        head_dim: of the attribute with the size of a head.
        scale: of the attribute with the factor of the scores, None for `head_dim ** -0.5`.
        softcap: of the attribute with the cap of the scores, if there can be one.
        norms: of the norms of query and key heads, before the rotation, if there are any.
        norms_all_heads: whether such a norm takes all heads of a token together, and not each by itself.
        norms_heads_first: whether such a norm takes heads before tokens.
        key_factor: of the attribute that keys are multiplied by, if there is one.
        positions: of the buffer `[positions, features]` of sines followed by cosines, from which rows are taken by
            the argument `position_ids`; None where the argument `position_embeddings` brings (cosines, sines).
        rotates: whether queries and keys are rotated.
        unrotated: of an argument that comes instead of a rotation; what it adds to the scores is in the mask already.
        repeats_kv: of the attribute that says whether the stock module caches a key head once per query head.
        bias: of the argument with what is added to the scores, `[heads or batch * heads, 1, keys]`; of more keys than
            the mask has, the last ones count.
        hides: whether masks are True where a key is hidden, and not where it is seen.
        residual: of the argument that the stock module adds to its output.
        heads: of the attribute with the number of query heads; None where the config has it.
        implementation: of transformers' attention, whose masks the stock module takes; None where it computes its
            attention itself, asks no config and always has a mask.
        interleaved: whether a rotation turns pairs of neighbours, not of halves.
        repeated: whether `position_embeddings` has a column for each feature, of which neighbours are the same, and
            not halves.
        sines_first: whether `position_embeddings` is (sines, cosines) with one column for each pair of features, and
            not (cosines, sines) with one for each feature.
        column_per_pair: whether (cosines, sines) have one column for each pair of features.
        sinks: of the parameter with a score for each head that takes part in the softmax and has no value.
    """

    forwards: tuple[str, ...]
    when: tuple[tuple[str, Any], ...] = ()
    projections: tuple[str, ...] | str = ("q_proj", "k_proj", "v_proj")
    concatenated: bool = False
    gated: bool = False
    output: str = "o_proj"
    head_dim: str = "head_dim"
    scale: str | None = "scaling"
    softcap: str | None = None
    norms: tuple[str, str] | None = None
    norms_all_heads: bool = False
    norms_heads_first: bool = False
    key_factor: str | None = None
    positions: str | None = None
    rotates: bool = True
    unrotated: str | None = None
    repeats_kv: str | None = None
    bias: str | None = None
    hides: bool = False
    residual: str | None = None
    heads: str | None = None
    implementation: str | None = "sdpa"
    interleaved: bool = False
    repeated: bool = False
    sines_first: bool = False
    column_per_pair: bool = False
    sinks: str | None = None

    def __post_init__(self) -> None:
        """Computes what the fields imply now: code that is compiled cannot do that when it first asks."""
        for name, entry in vars(type(self)).items():
            if isinstance(entry, cached_property):
                getattr(self, name)

    @cached_property
    def features_per_column(self) -> int:
        """How many features a column of cosines or sines rotates."""
        return 1 if self.positions is None and not self.sines_first and not self.column_per_pair else 2

    @cached_property
    def is_plain(self) -> bool:
        """Whether attention has nothing that operators of whole layers lack."""
        return not self.concatenated and not self.gated and self.key_factor is None and self.sinks is None

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Names of the projections."""
        return (self.projections,) if isinstance(self.projections, str) else self.projections

    @cached_property
    def children(self) -> tuple[str, ...]:
        """Names of the modules that an attention module of this family holds."""
        return (*self.linears, self.output, *(self.norms or ()))

    @cached_property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes that it has."""
        names = (
            self.head_dim,
            self.scale,
            self.softcap,
            self.key_factor,
            self.positions,
            self.repeats_kv,
            self.heads,
            "layer_idx",
            *(() if self.implementation is None else ("config", "is_causal")),
        )
        return tuple(name for name in names if name is not None)


@dataclass(frozen=True)
class KnownAttention:
    """A layout, and facts about the class of modules that it was found true of.

    Attributes:
        layout: where they keep things.
        cache: name of the argument of `forward` that holds the KV cache.
        read: names of the arguments that the stock module reads, or the attention function that it calls; all others
            change nothing. None where that is not known.
        positional: names of the arguments of `forward` after the first one, in their order.
    """

    layout: AttentionLayout
    cache: str
    read: frozenset[str] | None
    positional: tuple[str, ...] = ()
