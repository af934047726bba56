"""Scores of a model item by item, as the accuracy gate compares them: perplexity and KL over windows of tokens.

A task is anything with a `name`, a `kind` ("accuracy", "perplexity" or "kl") and `scores(model) -> Scores`; the gate
runs it on the float model once and on every candidate. Accuracy on benchmarks can be given by such a task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_int4.calibration.capture import call_model, evaluating
from torch_int4.errors import Int4Error
from torch_int4.tuning.paired import PairedLoss, accuracy_loss, kl_loss, perplexity_loss

KL_POSITIONS = 32  # per window, whose whole distribution of the float model is kept
_ROWS = 128  # positions whose log-probabilities of the whole vocabulary are held at a time


@dataclass(frozen=True)
class Scores:
    """One number per item, in the same order for every model, and the weight of each item.

    Attributes:
        values: `[n]`: mean negative log-likelihood per token, or a score whose larger values are better.
        weights: `[n]`, tokens per item; None for equal ones.
    """

    values: Tensor
    weights: Tensor | None = None


class Task(Protocol):
    """A task that the gate can run."""

    name: str
    kind: str

    def scores(self, model: Any) -> Scores:
        """Run the task on a model."""


@dataclass
class WindowTask:
    """Perplexity over windows of token ids `[n, T]`, one forward pass each, or the KL divergence from a float model.

    Attributes:
        windows: int64 `[n, T]`, at least two tokens each.
        name: for tables.
        kind: "perplexity" or "kl". For KL the first model that is scored is the one the others are compared with.
    """

    windows: Tensor
    name: str = "perplexity"
    kind: str = "perplexity"
    _reference: list[Tensor] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.windows.dim() != 2 or self.windows.shape[0] < 1 or self.windows.shape[1] < 2:
            raise Int4Error(f"{self.name}: needs windows [n, T] of two tokens or more; got {list(self.windows.shape)}")
        if self.kind not in ("perplexity", "kl"):
            raise Int4Error(f"{self.name}: kind must be 'perplexity' or 'kl'; got {self.kind!r}")

    def scores(self, model: Any) -> Scores:
        """Score a model; of KL, the mean over some positions of each window."""
        known = bool(self._reference)
        values = []
        with torch.no_grad(), evaluating(model):
            for index, ids in enumerate(self.windows):
                logits = call_model(model, ids[None]).logits[0, :-1]
                if self.kind == "perplexity":
                    values.append(nll_sum(logits, ids[1:]) / len(logits))
                    continue
                log_p = logits[self._positions(len(logits))].float().log_softmax(-1)
                if not known:
                    self._reference.append(log_p.half())
                values.append(self._kl(index, log_p))
        tokens = torch.full((len(values),), float(self.windows.shape[1] - 1), dtype=torch.float64)
        return Scores(torch.tensor(values, dtype=torch.float64), tokens)

    def _positions(self, count: int) -> Tensor:
        return torch.linspace(0, count - 1, min(count, KL_POSITIONS)).long().unique()

    def _kl(self, index: int, log_p: Tensor) -> float:
        return kl(log_p, self._reference[index].float()).mean().item()


def nll_sum(logits: Tensor, targets: Tensor) -> float:
    """Sum over positions of the negative log-likelihood, nats, of `targets` int64 `[T]` under `logits` `[T, V]`."""
    total = 0.0
    for rows, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        total += F.cross_entropy(rows.float(), wanted, reduction="none").double().sum().item()
    return total


def kl_sum(logits: Tensor, expected: Tensor) -> float:
    """Sum over positions of KL(expected || logits), nats, both `[T, V]`."""
    total = 0.0
    for rows, base in zip(logits.split(_ROWS), expected.split(_ROWS), strict=True):
        total += kl(rows.float().log_softmax(-1), base.float().log_softmax(-1)).double().sum().item()
    return total


def kl(log_p: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || p) of each position `[T]`, from log-probabilities `[T, V]`."""
    return F.kl_div(log_p, reference, reduction="none", log_target=True).sum(-1)


def compare(task: Task, base: Scores, candidate: Scores) -> PairedLoss:
    """The paired loss of a candidate on a task.

    Raises:
        Int4Error: an unknown kind, or other items than those of the float model.
    """
    if task.kind == "accuracy":
        return accuracy_loss(base.values, candidate.values)
    if task.kind == "perplexity":
        return perplexity_loss(base.values, candidate.values, candidate.weights)
    if task.kind == "kl":
        return kl_loss(candidate.values, candidate.weights)
    raise Int4Error(f"task {task.name!r}: kind must be 'accuracy', 'perplexity' or 'kl'; got {task.kind!r}")
