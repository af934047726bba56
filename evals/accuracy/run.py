"""Float against int4 on tasks of lm-eval: the same items, paired differences, and a verdict.

`run` measures; `table`, `markdown` and `as_json` show. The verdicts are those of `torch_int4.paired`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch_int4
from torch_int4 import Int4Config, Int4Error
from torch_int4.evals import models
from torch_int4.evals.accuracy import scores, tasks
from torch_int4.evals.accuracy.quantize import is_patched, to_int4
from torch_int4.evals.accuracy.scores import Items
from torch_int4.support.markdown import markdown_table
from torch_int4.tuning.paired import PairedLoss

HEADER = ("task", "metric", "items", "float", "±", "int4", "loss", "± paired", "verdict")


@dataclass(frozen=True)
class Row:
    """One metric of one task; `decides` if the gate looks at it, `stderr` is that of the float score alone."""

    task: str
    metric: str
    decides: bool
    loss: PairedLoss
    stderr: float


@dataclass(frozen=True)
class Comparison:
    """One int4 model against the float one.

    Attributes:
        config: its `Int4Config` as plain data; None for a model that was int4 when it was loaded.
        rows: every metric that can be paired.
        mean: loss of the mean accuracy over tasks, of the deciding metric of each; None below two such tasks.
        seconds: for quantizing and evaluating.
        items: score per document, task and metric, of the int4 model.
    """

    config: dict[str, Any] | None
    rows: tuple[Row, ...]
    mean: PairedLoss | None
    seconds: float
    items: tuple[Items, ...]

    def failed(self, max_loss: float, *, strict: bool = False) -> list[str]:
        """Losses that close the gate: those shown to be larger; with `strict`, also those not shown to be smaller."""
        losses = {f"{row.task} {row.metric}": row.loss for row in self.rows if row.decides}
        if self.mean is not None:
            losses["mean accuracy"] = self.mean
        bad = ("fail", "undecided") if strict else ("fail",)
        return [name for name, loss in losses.items() if loss.verdict(max_loss) in bad]


@dataclass(frozen=True)
class Result:
    """A run: one float model, and int4 models compared with it."""

    model: str
    baseline: str
    dtype: str
    tasks: tuple[str, ...]
    data: str | None
    limit: int | None
    batch_size: int | str
    max_length: int
    info: dict[str, Any]
    seconds: float
    items: tuple[Items, ...]
    comparisons: tuple[Comparison, ...]


def run(
    model: str | Path | None,
    configs: Sequence[Int4Config],
    names: Sequence[str],
    *,
    data: str | Path | None = None,
    baseline: str = "float",
    limit: int | None = None,
    batch_size: int | str = "auto",
    max_length: int | None = None,
    dtype: Any = "auto",
    calibration: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Result:
    """Evaluates the float model once, and each int4 model on the same items.

    Args:
        model: a directory or a name on the hub; None for the demo's model. It may hold an int4 model, with a
            directory as `baseline` and no config.
        configs: how to quantize, one comparison each.
        names: lm-eval's names of tasks.
        data: folder with the data of the tasks (see `evals/accuracy/tasks`); None takes it from the hub.
        baseline: "float" for `model` itself before it is quantized, or another directory.
        limit: only the first so many documents of each task.
        batch_size: as in lm-eval; "auto" gives both models the same batches.
        max_length: longest input in tokens; None for the model's own.
        dtype: of the float model: "auto" as saved, or a torch dtype.
        calibration: a text file for recipes that need one.
        note: is told what happens now.

    Raises:
        Int4Error: a model, a task or its data cannot be loaded, or a config cannot be applied.
    """
    from torch_int4.evals.accuracy import harness

    def evaluate(loaded: Any, tokenizer: Any, what: str) -> tuple[tuple[Items, ...], Any]:
        note(f"{what}: {', '.join(names)}")
        lm = harness.CpuLM(loaded, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        return tuple(scores.items(harness.evaluate(lm, names, manager, limit=limit))), lm

    with harness.task_manager(names, data) as manager:
        start = time.perf_counter()
        source = model if baseline == "float" else baseline
        base, tokenizer = load(source, dtype)
        if is_patched(base):
            raise Int4Error(f"{source}: is int4, so it is no baseline; name the float model by --baseline DIR")
        dtype_name = str(base.dtype).removeprefix("torch.")
        base_items, lm = evaluate(base, tokenizer, "float")
        longest, seconds = lm.max_length, time.perf_counter() - start
        del lm
        left: Any = base if baseline == "float" else None
        del base
        comparisons = []
        for config in configs:
            start = time.perf_counter()
            note(f"quantize: {describe(dataclasses.asdict(config))}")
            other = left if left is not None else load(model, dtype)[0]
            left = None
            applied = _quantize(other, tokenizer, config, calibration)
            other_items, lm = evaluate(other, tokenizer, "int4")
            del other, lm
            comparisons.append(compare(base_items, other_items, applied, time.perf_counter() - start))
    return Result(
        model=str(model or "SmolLM2-135M-Instruct"),
        baseline=baseline,
        dtype=dtype_name,
        tasks=tuple(names),
        data=None if data is None else str(data),
        limit=limit,
        batch_size=batch_size,
        max_length=longest,
        info=torch_int4.info(),
        seconds=round(seconds, 1),
        items=base_items,
        comparisons=tuple(comparisons),
    )


def _quantize(model: Any, tokenizer: Any, config: Int4Config, calibration: str | None) -> Any:
    """Patches the model, unless it was loaded as int4; the config that it has now, None if that is unknown."""
    if not is_patched(model):
        to_int4(model, tokenizer, config, calibration)
    report = getattr(model, "torch_int4_report", None)
    return None if report is None else dataclasses.asdict(report.config)


def load(model: str | Path | None, dtype: Any = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) from a directory, or from the hub where no such directory exists.

    Raises:
        Int4Error: neither has it.
    """
    if model is None or Path(model).expanduser().is_dir():
        return models.load(model, dtype=dtype)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model))
        return AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype).eval(), tokenizer
    except OSError as error:
        raise Int4Error(
            f"model {str(model)!r}: no such directory, and not on the hub or no network: {error}"
        ) from error


def compare(base: Sequence[Items], other: Sequence[Items], config: dict[str, Any] | None, seconds: float) -> Comparison:
    """Pairs the items of two models.

    Raises:
        Int4Error: the two did not answer the same documents.
    """
    theirs = {(entry.task, entry.metric): entry for entry in other}
    chosen = {name: task.scores for name, task in tasks.available().items()}
    rows, accuracies = [], []
    for entry in base:
        again = theirs.get((entry.task, entry.metric))
        if again is None:
            raise Int4Error(f"{entry.task}/{entry.metric}: only the float model has scores")
        of_task = [candidate.metric for candidate in base if candidate.task == entry.task]
        decides = entry.metric in scores.decisive(entry.task, of_task, chosen)
        rows.append(Row(entry.task, entry.metric, decides, _loss(entry, again), entry.stderr))
        if decides and entry.kind == "accuracy":
            accuracies.append((entry, again))
    mean = None
    if len(accuracies) > 1 and any(entry.score > 0 for entry, _ in accuracies):
        mean = scores.mean_accuracy(accuracies)
    return Comparison(config, tuple(rows), mean, round(seconds, 1), tuple(other))


def _loss(base: Items, other: Items) -> PairedLoss:
    """The loss; where the float model got nothing right there is nothing to lose, and nothing is decided."""
    if base.kind == "accuracy" and base.score <= 0:
        return PairedLoss("accuracy", base.score, other.score, 0.0, float("nan"), len(base.values))
    return scores.pair(base, other)


def describe(config: Mapping[str, Any] | None) -> str:
    """A config in one line: recipe, group size, and what differs from the defaults."""
    if config is None:
        return "as loaded"
    usual = dataclasses.asdict(Int4Config())
    shown = [
        f"{key}={value}" for key, value in config.items() if key in ("recipe", "group_size") or value != usual[key]
    ]
    return ", ".join(shown)


def cells(row: Row, max_loss: float) -> tuple[str, ...]:
    """A row as text, in the order of HEADER."""
    loss = row.loss
    digits = 4 if loss.kind == "accuracy" else 2
    verdict = loss.verdict(max_loss) if row.decides else ""
    if verdict == "undecided" and (needed := loss.items_needed(max_loss)):
        verdict += f" (about {needed} items)"
    return (
        row.task,
        row.metric,
        str(loss.items),
        f"{loss.base:.{digits}f}",
        f"{row.stderr:.{digits}f}",
        f"{loss.score:.{digits}f}",
        f"{loss.loss:+.2%}",
        f"{loss.stderr:.2%}",
        verdict,
    )


def table_rows(comparison: Comparison, max_loss: float) -> list[tuple[str, ...]]:
    """Every metric, and the mean over tasks."""
    rows = [cells(row, max_loss) for row in comparison.rows]
    if (mean := comparison.mean) is not None:
        name = ("mean accuracy", "", str(mean.items), f"{mean.base:.4f}", "", f"{mean.score:.4f}")
        rows.append((*name, f"{mean.loss:+.2%}", f"{mean.stderr:.2%}", mean.verdict(max_loss)))
    return rows


def notes(result: Result) -> Iterator[str]:
    """How the figures were taken, a line each."""
    limit = "all items" if result.limit is None else f"the first {result.limit} items of each task"
    yield f"model {result.model}, float in {result.dtype}, baseline {result.baseline}"
    source = result.data or "the hub"
    yield f"{limit}, from {source}, batch size {result.batch_size}, at most {result.max_length} tokens"
    info = result.info
    yield f"torch_int4 {info['version']}, torch {info['torch']}, kernels {info['isa']}, {info['threads']} threads"
    yield "loss: relative to float, positive is worse; ± paired: its standard error with items as samples"


def markdown(result: Result, max_loss: float) -> str:
    """The whole result as markdown."""
    parts = ["\n".join(f"- {line}" for line in notes(result))]
    for comparison in result.comparisons:
        parts.append(f"### {describe(comparison.config)}")
        parts.append(markdown_table(HEADER, table_rows(comparison, max_loss)))
    return "\n\n".join(parts) + "\n"


def as_json(result: Result, max_loss: float, *, strict: bool = False) -> dict[str, Any]:
    """Everything as plain data, with the score of every item."""
    data = dataclasses.asdict(result)
    for entry, comparison in zip(data["comparisons"], result.comparisons, strict=True):
        for row, measured in zip(entry["rows"], comparison.rows, strict=True):
            row["verdict"] = measured.loss.verdict(max_loss)
        entry["failed"] = comparison.failed(max_loss, strict=strict)
    return data | {"max_loss": max_loss, "strict": strict}
