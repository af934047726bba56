"""Perplexity of a causal language model over windows of a text, and paired comparison of two models on it.

Perplexity alone has an error bar of several percent on a few thousand tokens. The difference of two models on
the same tokens has a far smaller one, because most of the noise is the text's: `compare` reports that one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from torch_int4.calibration.capture import call_model, evaluating
from torch_int4.errors import Int4Error
from torch_int4.support.forwards import cache_keyword
from torch_int4.tuning.paired import perplexity_loss
from torch_int4.tuning.scoring import kl_sum, nll_sum


@dataclass(frozen=True)
class Perplexity:
    """Score of one model on one text.

    Attributes:
        ppl: exp of `nll`.
        nll: mean negative log-likelihood per scored token, in nats.
        tokens: number of scored tokens.
        window_nll: mean nll of each window; `window_tokens` scored tokens each.
        top1: int64 [tokens], the model's most likely token at each scored position.
        kl: mean KL(reference || model) per token in nats, if a reference was given.
        agreement: share of positions where model and reference have the same most likely token.
        reference: the reference's own score.
    """

    ppl: float
    nll: float
    tokens: int
    window_nll: tuple[float, ...]
    window_tokens: tuple[int, ...]
    top1: torch.Tensor = field(repr=False, compare=False)
    kl: float | None = None
    agreement: float | None = None
    reference: Perplexity | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of two scores.

    Attributes:
        relative: ppl_b / ppl_a - 1.
        stderr: standard error of `relative`, with windows as samples: rough for a handful, NaN for one.
        agreement: share of positions with the same most likely token.
    """

    relative: float
    stderr: float
    agreement: float


@dataclass
class _Sums:
    """Running sums of one model over windows."""

    nll: list[float] = field(default_factory=list)
    count: list[int] = field(default_factory=list)
    top1: list[torch.Tensor] = field(default_factory=list)

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        self.nll.append(nll_sum(logits, targets))
        self.count.append(targets.numel())
        self.top1.append(logits.argmax(-1))

    def score(self, **extra: Any) -> Perplexity:
        mean = sum(self.nll) / sum(self.count)
        return Perplexity(
            ppl=torch.tensor(mean, dtype=torch.float64).exp().item(),  # inf instead of OverflowError
            nll=mean,
            tokens=sum(self.count),
            window_nll=tuple(total / count for total, count in zip(self.nll, self.count, strict=True)),
            window_tokens=tuple(self.count),
            top1=torch.cat(self.top1),
            **extra,
        )


@torch.inference_mode()
def perplexity(
    model: Any,
    tokenizer_or_tokens: Any,
    text: str | None = None,
    *,
    window: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    reference: Any | None = None,
    cache: Callable[[], Any] | None = None,
) -> Perplexity:
    """Perplexity of `model` on a text, cut into windows that the model sees one at a time.

    Every token is scored at most once: a window starts `stride` tokens after the previous one and scores the
    tokens that the previous one did not reach. With the default (stride = window) windows do not overlap, and
    the first token of each is context only. A shorter last window counts too.

    Args:
        model: a causal language model, which runs without a cache unless there is a `cache`.
        tokenizer_or_tokens: a tokenizer for `text`, or the token ids themselves, int64 [T], without `text`.
        window: tokens per window, at least 2.
        stride: 1 to `window`; None for `window`.
        max_tokens: use only the first so many tokens.
        reference: a second model (float) run on the same windows: adds `kl`, `agreement` and `reference`. Its
            log-probabilities are held for 128 positions at a time only.
        cache: makes an empty KV cache, for each window another: `model` then attends to what that stores.

    Raises:
        Int4Error: for an unusable window or stride, or fewer than two tokens.
    """
    tokens = _tokens(tokenizer_or_tokens, text)[:max_tokens]
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise Int4Error(f"perplexity: window={window}, stride={stride}; need 1 <= stride <= window, window >= 2")
    if tokens.numel() < 2:
        raise Int4Error(f"perplexity: {tokens.numel()} tokens; at least 2 are needed, give a longer text")
    ours, theirs, divergence = _Sums(), _Sums(), 0.0
    with evaluating(model), contextlib.nullcontext() if reference is None else evaluating(reference):
        for ids, first in _windows(tokens, window, stride):
            logits = _logits(model, ids, cache and cache())[first - 1 : -1]
            ours.add(logits, ids[first:])
            if reference is not None:
                expected = _logits(reference, ids)[first - 1 : -1]
                theirs.add(expected, ids[first:])
                divergence += kl_sum(logits, expected)
    if reference is None:
        return ours.score()
    base = theirs.score()
    same = (torch.cat(ours.top1) == base.top1).double().mean().item()
    return ours.score(kl=divergence / base.tokens, agreement=same, reference=base)


def compare(a: Perplexity, b: Perplexity) -> Comparison:
    """Relative change of perplexity from `a` to `b`, both measured on the same windows.

    Raises:
        Int4Error: if the two were not measured on the same windows.
    """
    if a.window_tokens != b.window_tokens:
        raise Int4Error("compare: the two were measured on different windows; use one text and one window size")
    loss = perplexity_loss(a.window_nll, b.window_nll, a.window_tokens)
    agreement = (a.top1 == b.top1).double().mean().item()
    return Comparison(relative=loss.loss, stderr=loss.stderr, agreement=agreement)


def _tokens(tokenizer_or_tokens: Any, text: str | None) -> torch.Tensor:
    if isinstance(tokenizer_or_tokens, torch.Tensor) == (text is not None):
        raise Int4Error("perplexity: give a tokenizer and a text, or token ids and no text")
    if isinstance(tokenizer_or_tokens, torch.Tensor):
        return tokenizer_or_tokens.reshape(-1)
    # verbose=False: windows keep the model within its length, so the tokenizer's warning would mislead.
    return tokenizer_or_tokens(text, return_tensors="pt", verbose=False)["input_ids"][0]


def _windows(tokens: torch.Tensor, window: int, stride: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Yields (ids [<= window], index of the first id to score)."""
    total, scored_to = tokens.numel(), 0
    for begin in range(0, total, stride):
        end = min(begin + window, total)
        first = max(scored_to - begin, 1)
        if begin + first < end:
            yield tokens[begin:end], first
        scored_to = end
        if end == total:
            return


def _logits(model: Any, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
    """Logits [T, V]."""
    if cache is None:
        return call_model(model, ids[None]).logits[0]
    return model(ids[None], **cache_keyword(model, cache), use_cache=True).logits[0]
