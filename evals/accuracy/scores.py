"""Scores of two lm-eval runs on the same items, compared item by item."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_int4.errors import Int4Error
from torch_int4.tuning.paired import PairedLoss, accuracy_loss, perplexity_loss

# Metrics of tasks without a file in evals/accuracy/tasks: the first one that a task has decides.
_USUAL = ("acc", "exact_match", "word_perplexity", "perplexity")


@dataclass(frozen=True)
class Items:
    """One metric of one task, an entry per document.

    Attributes:
        task: lm-eval's name.
        metric: lm-eval's name.
        kind: "accuracy" (the mean of `values`; more is better) or "perplexity" (`values` are negative log-likelihoods
            per unit in nats, and the score is exp of their mean with `weights`).
        ids: what identifies each document and its prompt.
        values: one number per document.
        weights: units of each document (words, bytes), or None where all count the same.
    """

    task: str
    metric: str
    kind: str
    ids: tuple[str, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...] | None = None

    @property
    def score(self) -> float:
        """The figure that lm-eval prints for it."""
        values = torch.tensor(self.values, dtype=torch.float64)
        weights = torch.ones_like(values) if self.weights is None else torch.tensor(self.weights, dtype=torch.float64)
        mean = (values * weights).sum() / weights.sum()
        return float(mean if self.kind == "accuracy" else mean.exp())

    @property
    def stderr(self) -> float:
        """Standard error of the score with documents as samples; NaN for one."""
        own = self.values
        if self.kind == "perplexity":
            against_one = perplexity_loss([0.0] * len(own), own, self.weights)
            return against_one.stderr
        return float(torch.tensor(own, dtype=torch.float64).std() / math.sqrt(len(own))) if len(own) > 1 else math.nan


def items(results: Mapping[str, Any]) -> list[Items]:
    """Every metric of lm-eval results (with samples) that can be compared item by item, in lm-eval's order."""
    found = []
    for task, samples in results["samples"].items():
        first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        first.sort(key=lambda sample: sample["doc_id"])
        better = results.get("higher_is_better", {}).get(task, {})
        for metric in first[0]["metrics"] if first else ():
            made = _metric(task, metric, first, better.get(metric))
            if made is not None:
                found.append(made)
    return found


def pair(base: Items, other: Items) -> PairedLoss:
    """The loss from `base` to `other`.

    Raises:
        Int4Error: they are not of the same documents and prompts.
    """
    if (base.task, base.metric, base.ids, base.weights) != (other.task, other.metric, other.ids, other.weights):
        raise Int4Error(
            f"{base.task}/{base.metric} and {other.task}/{other.metric}: documents or prompts differ, so that scores "
            "cannot be paired; evaluate both with the same data, limit and tokenizer settings"
        )
    if base.kind == "perplexity":
        return perplexity_loss(base.values, other.values, base.weights)
    return accuracy_loss(base.values, other.values)


def mean_accuracy(pairs: Sequence[tuple[Items, Items]]) -> PairedLoss:
    """Relative loss of the unweighted mean over tasks of their accuracies, as tables of papers have it.

    Tasks are independent samples. With ratio r = mean(other) / mean(base), the variance of r is that of the stratified
    mean of residuals other - r * base, divided by mean(base)^2 (Cochran, Sampling Techniques, chapters 5 and 6).
    """
    bases = [torch.tensor(base.values, dtype=torch.float64) for base, _ in pairs]
    others = [torch.tensor(other.values, dtype=torch.float64) for _, other in pairs]
    base, other = (float(sum(values.mean() for values in side)) / len(pairs) for side in (bases, others))
    if not base > 0:
        raise Int4Error("mean accuracy: the float model got nothing right, so there is nothing to lose")
    ratio = other / base
    variances = [(c - ratio * b).var() / len(b) for b, c in zip(bases, others, strict=True)]  # NaN for a single item
    error = math.sqrt(float(sum(variances))) / len(pairs) / base
    return PairedLoss("accuracy", base, other, 1 - ratio, error, sum(len(values) for values in bases))


def decisive(task: str, metrics: Iterable[str], chosen: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The metrics of a task that decide: those its file names, or the first usual one, or the first of all."""
    metrics = list(metrics)
    wanted = tuple(metric for metric in chosen.get(task, ()) if metric in metrics)
    return wanted or tuple(metric for metric in _USUAL if metric in metrics)[:1] or tuple(metrics[:1])


def _metric(task: str, metric: str, samples: Sequence[Mapping[str, Any]], higher_is_better: Any) -> Items | None:
    """The metric as items; None where its kind is not known to be an average over documents."""
    ids = tuple(f"{sample['doc_hash']}:{sample['prompt_hash']}" for sample in samples)
    raw = [sample[metric] for sample in samples]
    if metric.endswith("perplexity"):
        if all(isinstance(value, (tuple, list)) and len(value) == 2 for value in raw):
            weights = tuple(float(units) for _, units in raw)
            values = tuple(-likelihood / units for likelihood, units in raw)
            return Items(task, metric, "perplexity", ids, values, weights)
        if all(isinstance(value, float) for value in raw):
            return Items(task, metric, "perplexity", ids, tuple(-value for value in raw))
        return None
    if higher_is_better and all(isinstance(value, (bool, int, float)) for value in raw):
        return Items(task, metric, "accuracy", ids, tuple(float(value) for value in raw))
    return None
