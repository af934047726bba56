"""Loss of a quantized model against its float model, item by item, with a standard error and a verdict.

Two models that answer the same items share most of the noise of those items, so the difference per item has a
far smaller error than either score. Losses are relative and positive when the quantized model is worse:
accuracy that falls and perplexity that rises count in the same direction. Standard errors are those of ratio
estimators (Cochran, Sampling Techniques, chapter 6) carried through by the delta method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_int4.errors import Int4Error

Z = 2.0  # standard errors between a loss and the limit from which a verdict counts as decided


@dataclass(frozen=True)
class PairedLoss:
    """The loss on the same items.

    Attributes:
        kind: "accuracy" (relative drop of the mean score), "perplexity" (relative rise) or "kl" (nats per token).
        base: score of the float model (mean score, perplexity, or 0 for KL).
        score: score of the quantized model, in the same unit.
        loss: what is lost, positive when worse: 0.01 is one percent (0.01 nats for KL).
        stderr: standard error of `loss` with items as samples; NaN for a single item.
        items: how many there were.
    """

    kind: str
    base: float
    score: float
    loss: float
    stderr: float
    items: int

    def verdict(self, max_loss: float, z: float = Z) -> str:
        """ "pass" or "fail" where the loss is `z` standard errors or more away from the limit, else "undecided"."""
        margin = z * self.stderr
        if math.isnan(self.loss):
            return "fail"
        if math.isnan(margin):
            return "undecided"
        if self.loss + margin <= max_loss:
            return "pass"
        return "fail" if self.loss - margin > max_loss else "undecided"

    def within(self, max_loss: float) -> bool:
        """Whether the measured loss itself keeps the limit, decided or not."""
        return self.loss <= max_loss

    def items_needed(self, max_loss: float, z: float = Z) -> int | None:
        """About how many such items a decided verdict takes; None where that cannot be said."""
        distance = abs(max_loss - self.loss)
        if not math.isfinite(self.stderr) or not math.isfinite(distance) or distance == 0:
            return None
        return math.ceil(self.items * (z * self.stderr / distance) ** 2)

    def __str__(self) -> str:
        if self.kind == "kl":
            return f"KL {self.loss:.4f} ± {self.stderr:.4f} nats per token"
        return f"{self.kind} {self.base:.4g} -> {self.score:.4g}, loss {self.loss:+.2%} ± {self.stderr:.2%}"


def accuracy_loss(base: Any, score: Any) -> PairedLoss:
    """Relative drop of a mean score (accuracy, or anything whose larger values are better) over items.

    Args:
        base: one number per item from the float model, `[n]`: a tensor or a sequence.
        score: the same items from the quantized model.

    Raises:
        Int4Error: the lists differ in length, are empty, or the float model's mean is not positive, so that
            there is nothing to lose a share of.
    """
    b, c = _pair(base, score)
    mean = b.mean().item()
    if not mean > 0:
        raise Int4Error(f"paired loss: the float model's mean score is {mean:g}; a relative loss needs a positive one")
    ratio = c.mean().item() / mean
    return PairedLoss("accuracy", mean, c.mean().item(), 1 - ratio, _stderr(c - ratio * b, None) / mean, b.numel())


def perplexity_loss(base_nll: Any, nll: Any, tokens: Any = None) -> PairedLoss:
    """Relative rise of perplexity over items (windows or documents).

    Args:
        base_nll: mean negative log-likelihood per token of each item from the float model, nats, `[n]`.
        nll: the same items from the quantized model.
        tokens: scored tokens of each item, its weight; equal by default.

    Raises:
        Int4Error: the lists differ in length or are empty, or a weight is not positive.
    """
    b, c = _pair(base_nll, nll)
    weights = _weights(tokens, b.numel())
    difference = _mean(c - b, weights)
    ratio = _exp(difference)
    error = ratio * _stderr(c - b - difference, weights)
    return PairedLoss("perplexity", _exp(_mean(b, weights)), _exp(_mean(c, weights)), ratio - 1, error, b.numel())


def kl_loss(kl: Any, tokens: Any = None) -> PairedLoss:
    """Mean KL(float || quantized) per token, nats; on text of the float model itself it is the rise of log-perplexity.

    Args:
        kl: mean KL per token of each item, `[n]`.
        tokens: tokens of each item, its weight; equal by default.
    """
    values, _ = _pair(kl, kl)
    weights = _weights(tokens, values.numel())
    mean = _mean(values, weights)
    return PairedLoss("kl", 0.0, mean, mean, _stderr(values - mean, weights), values.numel())


def worst(losses: Sequence[PairedLoss], max_loss: float) -> PairedLoss:
    """The loss that a gate has to look at: the largest one; NaN counts as the largest of all.

    Raises:
        Int4Error: there are none.
    """
    if not losses:
        raise Int4Error("paired loss: nothing was measured, so nothing can pass")
    order = {"fail": 2, "undecided": 1, "pass": 0}
    return max(losses, key=lambda loss: (math.isnan(loss.loss), loss.loss, order[loss.verdict(max_loss)]))


def _pair(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    first, second = (torch.as_tensor(values, dtype=torch.float64).flatten() for values in (a, b))
    if first.numel() != second.numel() or first.numel() == 0:
        raise Int4Error(
            f"paired loss: {first.numel()} items against {second.numel()}; both models have to answer the same items"
        )
    return first, second


def _weights(tokens: Any, items: int) -> Tensor:
    if tokens is None:
        return torch.ones(items, dtype=torch.float64)
    weights = torch.as_tensor(tokens, dtype=torch.float64).flatten()
    if weights.numel() != items or not bool((weights > 0).all()):
        raise Int4Error(f"paired loss: needs a positive number of tokens for each of {items} items")
    return weights


def _mean(values: Tensor, weights: Tensor) -> float:
    return ((weights * values).sum() / weights.sum()).item()


def _stderr(residuals: Tensor, weights: Tensor | None) -> float:
    """Standard error of a weighted mean whose residuals are given: n/(n-1) sum(w^2 r^2) / sum(w)^2."""
    n = residuals.numel()
    if n < 2:
        return math.nan
    w = torch.ones_like(residuals) if weights is None else weights
    return math.sqrt(n / (n - 1) * (w * residuals).square().sum().item()) / w.sum().item()


def _exp(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).exp().item()  # inf instead of OverflowError
