"""Continuous batching of transformers (`generate_batch`, a paged cache) on patched models, or a clear refusal."""

from __future__ import annotations

from typing import Any

from torch_int4.errors import Int4Error

PAGED = "sdpa"  # the attention of transformers that reads a paged cache on CPUs


def require_paged(model: Any) -> None:
    """Raises where transformers' paged cache would be ignored by the model's attention, or break it.

    The paged cache reaches attention through transformers' attention interface. Modules that do not call it (GPT-J,
    Falcon) would attend to other requests of the batch, and return wrong tokens without a word.

    Caps of the scores are lost on that way, too.

    Raises:
        Int4Error: naming the model and what to use instead.
    """
    if getattr(model.config, "attn_logit_softcapping", None):
        raise Int4Error(
            f"{type(model).__name__}: transformers' paged attention ignores the cap of its attention scores, so "
            "continuous batching would give wrong tokens; use generate() with a padded batch"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise Int4Error(
            f"{type(model).__name__}: its attention does not call transformers' attention interface, so continuous "
            "batching (generate_batch, init_continuous_batching) would give wrong tokens; use generate() with a "
            "padded batch"
        )


class ContinuousBatching:
    """Part of what is mixed into models that generate."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' manager, with attention that it can use while it runs; arguments are those of transformers."""
        from torch_int4.nn.attention_interface import NAMES

        require_paged(self)
        before = self.config._attn_implementation  # type: ignore[attr-defined]
        if ours := before in NAMES:
            self.set_attn_implementation(PAGED)  # type: ignore[attr-defined]
        try:
            manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        except Exception:
            if ours:
                self.set_attn_implementation(before)  # type: ignore[attr-defined]
            raise
        if ours:
            manager._original_attn_impl = before  # what stopping it restores
        return manager
