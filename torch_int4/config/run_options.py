"""The options that say which linears of a model are quantized and how the model runs; recipes do not see them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from torch_int4.config import _checks

COMPUTE = ("int8", "int8x2", "bf16", "fp32")
HEADS = ("float", "int4", "int8")
EMBEDDINGS = ("float", "bf16")
KV_CACHES = ("auto", "fp32", "bf16", "fp16", "int8")
ATTENTIONS = ("fused", "stock")
_IN_FILES = "in files"  # metadata of a field that a checkpoint which is quantized already has decided


@dataclass(frozen=True)
class RunOptions:
    """Which linears become int4, and how a model of them runs. `Int4Config` describes the fields.

    Raises:
        Int4Error: a value that is not accepted; the message names the field and the values that are.
    """

    compute: str = "int8"
    head: str = "int8"
    attention: str = "fused"
    kv_cache: str = "auto"
    embeddings: str = "float"
    int8: tuple[str, ...] = field(default=(), metadata={_IN_FILES: True})
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("int8", "skip"):  # frozen, but a single pattern or a list is taken too
            object.__setattr__(self, name, _checks.patterns(self, name))
        _checks.choice(self, "compute", COMPUTE)
        _checks.choice(self, "head", HEADS)
        _checks.choice(self, "attention", ATTENTIONS)
        _checks.choice(self, "kv_cache", KV_CACHES)
        _checks.choice(self, "embeddings", EMBEDDINGS)


# Names of the fields that can be chosen anew for a checkpoint that is quantized already.
OF_RUNNING = tuple(entry.name for entry in fields(RunOptions) if not entry.metadata.get(_IN_FILES))
