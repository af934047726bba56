"""Perplexity of a causal language model over windows of a text, and paired comparison of two models on it.

Perplexity alone has an error bar of several percent on a few thousand tokens. The difference of two models on
the same tokens has a far smaller one, because most of the noise is the text's: `compare` reports that one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from torch_int4.errors import Int4Error

_ROWS = 128  # positions whose full-vocabulary log-probabilities are held at a time


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

    def add(self, nll: float, top1: torch.Tensor) -> None:
        self.nll.append(nll)
        self.count.append(top1.numel())
        self.top1.append(top1)

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
        model: a causal language model; it is called as ``model(input_ids, use_cache=False).logits``, unless there
            is a `cache`.
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
    ours, theirs, kl_sum = _Sums(), _Sums(), 0.0
    for ids, first in _windows(tokens, window, stride):
        targets = ids[first:]
        logits = _logits(model, ids, cache and cache())[first - 1 : -1]
        if reference is None:
            ours.add(*_score(logits, targets))
            continue
        expected = _logits(reference, ids)[first - 1 : -1]
        ours.add(*_score(logits, targets))
        theirs.add(*_score(expected, targets))
        kl_sum += _kl(logits, expected)
    if reference is None:
        return ours.score()
    base = theirs.score()
    same = (torch.cat(ours.top1) == base.top1).double().mean().item()
    return ours.score(kl=kl_sum / base.tokens, agreement=same, reference=base)


def compare(a: Perplexity, b: Perplexity) -> Comparison:
    """Relative change of perplexity from `a` to `b`, both measured on the same windows.

    The error is that of a weighted mean of per-window differences d_i with weights w_i (scored tokens):
    SE^2 = n/(n-1) * sum(w_i^2 (d_i - d)^2) / sum(w_i)^2 (the ratio estimator of Cochran, Sampling Techniques,
    chapter 6), carried to the relative difference exp(d) - 1 by its derivative.

    Raises:
        Int4Error: if the two were not measured on the same windows.
    """
    if a.window_tokens != b.window_tokens:
        raise Int4Error("compare: the two were measured on different windows; use one text and one window size")
    weights = a.window_tokens
    total, n = sum(weights), len(weights)
    differences = [after - before for before, after in zip(a.window_nll, b.window_nll, strict=True)]
    mean = sum(w * d for w, d in zip(weights, differences, strict=True)) / total
    spread = sum((w * (d - mean)) ** 2 for w, d in zip(weights, differences, strict=True))
    error = math.sqrt(n / (n - 1) * spread) / total if n > 1 else math.nan
    ratio = torch.tensor(mean, dtype=torch.float64).exp().item()
    agreement = (a.top1 == b.top1).double().mean().item()
    return Comparison(relative=ratio - 1, stderr=error * ratio, agreement=agreement)


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
    """Logits [T, V] in eval mode, whatever mode the caller left the model in."""
    was_training = model.training
    model.eval()
    try:
        return model(ids[None], past_key_values=cache, use_cache=cache is not None).logits[0]
    finally:
        model.train(was_training)


def _score(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Sum of nll over positions, and the most likely tokens [T]."""
    nll = 0.0
    for rows, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        nll += F.cross_entropy(rows.float(), wanted, reduction="none").double().sum().item()
    return nll, logits.argmax(-1)


def _kl(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Sum over positions of KL(expected || logits)."""
    total = 0.0
    for rows, base in zip(logits.split(_ROWS), expected.split(_ROWS), strict=True):
        ours, theirs = rows.float().log_softmax(-1), base.float().log_softmax(-1)
        total += F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).double().sum().item()
    return total
