"""Input embeddings in bf16, for models that compute in another dtype."""

from __future__ import annotations

from torch import nn

from torch_int4.nn.embedding import Bf16Embedding
from torch_int4.patching import hooks as _hooks
from torch_int4.patching.plan import Held
from torch_int4.patching.report import PatchReport


def store_bf16(old: nn.Embedding, held: Held, report: PatchReport) -> None:
    """Put a bf16 table into every place of an embedding."""
    new = Bf16Embedding.from_embedding(old)
    entry = (held.name, 4 * old.weight.numel(), 2 * old.weight.numel())
    _hooks.replace(old, new, held.places)
    report.embeddings.append(entry)
