"""`autotune`: the cheapest way to quantize a model that keeps the loss within a limit, found by measuring.

Candidates are tried in the order given. Each is a whole model, scored on the same items as the float model; what is
judged is the paired difference with its standard error. If none passes, the layers of the best one that do most
damage per byte are stored in int8, as few as it takes. What was tried is told in a table, also when nothing passed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torch_int4 import recipes
from torch_int4.calibration.data import Calibration
from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.patching.patcher import patch
from torch_int4.support.markdown import markdown_table
from torch_int4.support.progress import tell
from torch_int4.tuning.bandwidth import read_bandwidth
from torch_int4.tuning.footprint import read_bytes
from torch_int4.tuning.paired import PairedLoss, worst
from torch_int4.tuning.pristine import Pristine
from torch_int4.tuning.scoring import Scores, Task, WindowTask, compare
from torch_int4.tuning.sensitivity import choose, damage

ATTEMPTS = 4  # numbers of int8 layers that are tried
EVALUATION = 32  # windows, where the user gives none
EVALUATION_LENGTH = 512


@dataclass(frozen=True)
class Tried:
    """One candidate: what it lost on each task, its size, and what it took.

    Attributes:
        losses: task name -> loss.
        bits: bits per weight of all linears that were quantized, scales included.
        seconds: to quantize and to evaluate.
        tokens_per_second: at most, from the bytes of the weights and the machine's read bandwidth.
        int8: how many layers were raised to int8.
    """

    config: Int4Config
    losses: dict[str, PairedLoss]
    bits: float
    seconds: tuple[float, float]
    tokens_per_second: float
    int8: int = 0

    def worst(self, max_loss: float) -> PairedLoss:
        """The loss that decides."""
        return worst(list(self.losses.values()), max_loss)

    @property
    def name(self) -> str:
        """A short description of the config."""
        c = self.config
        offset = "sym" if c.symmetric else f"asym-{c.zeros}"
        group = "row" if c.group_size == -1 else f"g{c.group_size}"
        return f"{c.recipe} {group} {offset}" + (f" + {self.int8} int8" if self.int8 else "")


@dataclass
class AutotuneResult:
    """The recipes that were tried, and their results.

    Attributes:
        passed: whether a candidate kept the limit.
        config: of the one that did, else of the one that lost least.
        model: the quantized model where one passed, which is the one that was given; else the float model.
        tried: every candidate, in order.
        max_loss: the limit.
        decided: whether the chosen one's loss is further from the limit than two standard errors.
    """

    passed: bool
    config: Int4Config
    model: Any
    max_loss: float
    decided: bool
    tried: list[Tried] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [table(self.tried, self.max_loss), ""]
        best = next(t for t in self.tried if t.config == self.config)
        loss = best.worst(self.max_loss)
        if self.passed:
            lines.append(f"chosen: {best.name}: {loss}, limit {self.max_loss:.2%}")
        else:
            lines.append(f"nothing passed the limit of {self.max_loss:.2%}; the best was {best.name}: {loss}")
        if not self.decided:
            needed = loss.items_needed(self.max_loss)
            more = f"about {needed} items would decide" if needed else "more items are needed"
            lines.append(
                f"the evaluation is too small to decide: {loss.items} items leave ± {loss.stderr:.2%} around a loss of "
                f"{loss.loss:.2%}; {more}"
            )
        return "\n".join(lines)


def default_candidates(config: Int4Config | None = None) -> list[Int4Config]:
    """Candidates in the order of what they cost, with all other fields as in `config`."""
    base = config or Int4Config()
    order = [(recipe, group) for recipe in ("rtn", "awq", "gptq", "awq+gptq") for group in (128, 32)]
    return [replace(base, recipe=r, group_size=g) for r, g in [*order, ("signround", 32)]]


def autotune(
    model: Any,
    tokenizer: Any = None,
    *,
    max_loss: float = 0.01,
    config: Int4Config | None = None,
    candidates: Sequence[Int4Config] | None = None,
    calibration: Any = None,
    evaluation: Any = None,
    tasks: Sequence[Task] = (),
    windows: int = EVALUATION,
    int8: bool = True,
    progress: bool | None = None,
) -> AutotuneResult:
    """Quantize `model` in place by the first candidate whose loss keeps `max_loss`; leave it in float if none does.

    Args:
        model: the float model. If it came from a directory and is unchanged, its weights are read from there again
            between candidates; else a second copy is held in memory.
        tokenizer: for texts.
        max_loss: accepted loss: relative rise of perplexity or drop of accuracy, or nats of KL.
        config: fields of the default candidates other than recipe and group size.
        candidates: what to try, in this order; `default_candidates(config)` by default.
        calibration: data for recipes that need some, as in `patch`.
        evaluation: held-out data in the same forms; by default, windows of the calibration data that are not
            calibrated on.
        tasks: what to judge by instead of perplexity.
        windows: how many windows of 512 tokens to evaluate on, where `evaluation` does not say.
        int8: raise layers to int8 before giving up.
        progress: tell each step on the standard error output; by default on a terminal.

    Raises:
        Int4Error: no candidates, or unusable data.
    """
    tries = list(default_candidates(config) if candidates is None else candidates)
    if not tries or not all(isinstance(c, Int4Config) for c in tries) or not max_loss > 0:
        raise Int4Error("autotune: needs a positive max_loss and at least one candidate, each an Int4Config")
    data, held_out = _split(calibration, evaluation, tokenizer, model, windows)
    judged: Sequence[Task] = tasks or [WindowTask(held_out)]
    tuner = _Tuner(model, data, judged, max_loss, progress)
    try:
        return tuner.search(tries, held_out, int8=int8)
    except BaseException:
        tuner.pristine.restore()
        raise


class _Tuner:
    """One search: the float model's scores, and what was tried."""

    def __init__(
        self, model: Any, data: Calibration, tasks: Sequence[Task], max_loss: float, progress: bool | None
    ) -> None:
        self.tasks, self.data, self.max_loss = tasks, data, max_loss
        self.show = progress
        self.base: dict[str, Scores] = {task.name: task.scores(model) for task in tasks}
        self.bandwidth = read_bandwidth()
        self.tried: list[Tried] = []
        self.pristine = Pristine(model)

    def search(self, candidates: Sequence[Int4Config], windows: Tensor, *, int8: bool) -> AutotuneResult:
        for config in candidates:
            model = self._try(config)
            if self._passes():
                return self._finish(model)
            del model
        if int8:
            for config, count in self._raised(windows):
                model = self._try(config, count)
                if self._passes():
                    return self._finish(model)
                del model
        return self._finish(None)

    def _try(self, config: Int4Config, int8: int = 0) -> Any:
        start = time.monotonic()
        model = self.pristine.fresh()
        recipe = recipes.parse(config.recipe)
        data = self.data if recipe.needs_calibration or recipe.configure(config.weights).clip else None
        patch(model, config, calibration=data, progress=False)
        middle = time.monotonic()
        losses = {t.name: compare(t, self.base[t.name], t.scores(model)) for t in self.tasks}
        seconds = (middle - start, time.monotonic() - middle)
        bits = model.torch_int4_report.bits_per_weight()
        speed = self.bandwidth / max(read_bytes(model), 1)
        self.tried.append(Tried(config, losses, bits, seconds, speed, int8))
        last = self.tried[-1]
        tell(f"{last.name}: {last.worst(self.max_loss)}", self.show)
        return model

    def _passes(self) -> bool:
        return self.tried[-1].worst(self.max_loss).within(self.max_loss)

    def _best(self) -> Tried:
        losses = [tried.worst(self.max_loss).loss for tried in self.tried]
        return min(zip(losses, self.tried, strict=True), key=lambda pair: (pair[0] != pair[0], pair[0]))[1]

    def _raised(self, windows: Tensor) -> Iterator[tuple[Int4Config, int]]:
        """The best candidate with more and more layers in int8, those first that do most damage per byte."""
        best = self._best()
        layers = damage(self.pristine.fresh(), best.config, windows, progress=self.show)
        count, last = 0, best.worst(self.max_loss).loss
        for _ in range(ATTEMPTS):
            if count == len(layers) or math.isnan(last):
                return
            count = choose(layers, count, last, self.max_loss)
            names = tuple(layer.name for layer in layers[:count])
            yield replace(best.config, int8=(*best.config.int8, *names)), count
            last = self.tried[-1].worst(self.max_loss).loss

    def _finish(self, model: Any) -> AutotuneResult:
        chosen = self._best() if model is None else self.tried[-1]
        if model is None:
            self.pristine.restore()
        else:
            self.pristine.become(model)
        decided = chosen.worst(self.max_loss).verdict(self.max_loss) != "undecided"
        return AutotuneResult(model is not None, chosen.config, self.pristine.model, self.max_loss, decided, self.tried)


def table(tried: Sequence[Tried], max_loss: float) -> str:
    """The recipes that were tried, as a markdown table."""
    header = ("candidate", "loss", "±", "verdict", "bits", "quantize s", "evaluate s", "tokens/s at most")
    rows = []
    for entry in tried:
        loss = entry.worst(max_loss)
        cells = (f"{loss.loss:+.2%}", f"{loss.stderr:.2%}", loss.verdict(max_loss), f"{entry.bits:.2f}")
        times = (f"{entry.seconds[0]:.1f}", f"{entry.seconds[1]:.1f}", f"{entry.tokens_per_second:.0f}")
        rows.append((entry.name, *cells, *times))
    return markdown_table(header, rows)


def _split(calibration: Any, evaluation: Any, tokenizer: Any, model: Any, count: int) -> tuple[Calibration, Tensor]:
    """Calibration data as windows, and windows to evaluate on that are not among them."""
    data = Calibration.of(calibration, tokenizer)
    if evaluation is not None:
        held = Calibration.of(evaluation, tokenizer)
        if not isinstance(evaluation, Calibration):
            held = replace(held, samples=count, length=EVALUATION_LENGTH)
        return replace(data, data=data.windows(model)), held.windows(model)
    more = replace(data, samples=data.samples + -(-count * EVALUATION_LENGTH // data.length))
    windows = more.windows(model)
    if len(windows) < 2:
        raise Int4Error("autotune: one window of text cannot serve both calibration and evaluation; give more text")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(data.seed))
    kept = min(data.samples, max(1, len(windows) * 2 // 3))
    chosen, rest = windows[order[:kept].sort().values], windows[order[kept:].sort().values]
    length = min(EVALUATION_LENGTH, rest.shape[1])
    rest = rest[:, : rest.shape[1] // length * length].reshape(-1, length)
    return replace(data, data=chosen, length=chosen.shape[1]), rest
