"""Measures every method in turn, each in a process of its own, and pairs what can be paired with the float model."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch_int4
from torch_int4.errors import Int4Error
from torch_int4.evals import models
from torch_int4.evals.accuracy import scores
from torch_int4.evals.accuracy.scores import Items
from torch_int4.evals.report.measure import Spec
from torch_int4.evals.report.methods import Method
from torch_int4.tuning.paired import PairedLoss, perplexity_loss


@dataclass(frozen=True)
class Row:
    """One method; sizes in bytes, speeds in tokens per second (best and median of the repeats).

    Attributes:
        weight_bytes: of parameters and buffers, each storage once.
        run_bytes: largest resident memory while generating, interpreter and libraries included.
        run_bytes_with_loading: the system could not leave the peak of loading out.
        ppl, ppl_loss: perplexity, and its relative rise over float32, paired by window.
        accuracy: mean over tasks, against float32, paired by item; None without tasks.
        layer_error: relative error of the hidden states: embeddings first, then after each layer.
        error: why the method could not be measured; the rest is None then.
    """

    label: str
    kind: str
    error: str | None = None
    weight_bytes: int | None = None
    run_bytes: int | None = None
    run_bytes_with_loading: bool = False
    speed: dict[str, float] | None = None
    ppl: float | None = None
    ppl_loss: PairedLoss | None = None
    accuracy: PairedLoss | None = None
    layer_error: tuple[float, ...] = ()


@dataclass(frozen=True)
class Report:
    """All rows, and how they were taken."""

    model: str
    info: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[Row, ...]


def run(
    model_dir: str | Path | None,
    methods: Sequence[Method],
    *,
    note: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> Report:
    """Measures `methods`, of which the first must be the float32 model.

    Args:
        model_dir: directory of the float model; None for the demo's.
        methods: see `methods.methods`.
        note: is told what is measured now.
        settings: fields of `measure.Spec`.

    Raises:
        Int4Error: the float model itself cannot be measured.
    """
    folder = str(models.default_model_dir() if model_dir is None else Path(model_dir).expanduser())
    rows: list[Row] = []
    first: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="torch_int4-report-") as scratch:
        for method in methods:
            note(method.label)
            spec = Spec(folder, method.kind, method.options, str(Path(scratch) / "states.npy"), **settings)
            found = _in_process(spec, Path(scratch))
            if isinstance(found, str):
                if not first:
                    raise Int4Error(f"report: the float model cannot be measured: {found}")
                rows.append(Row(method.label, method.kind, error=found))
                continue
            first = first or found
            rows.append(_row(method, found, first))
    return Report(Path(folder).name, torch_int4.info(), settings, tuple(rows))


def _in_process(spec: Spec, scratch: Path) -> dict[str, Any] | str:
    """The figures that one process measured, or the last line it complained with."""
    spec_file, result_file = scratch / "spec.json", scratch / "result.json"
    spec_file.write_text(json.dumps(dataclasses.asdict(spec)), encoding="utf-8")
    result_file.unlink(missing_ok=True)
    command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    command += ["-m", "torch_int4.evals.report.measure", str(spec_file), str(result_file)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0 and result_file.is_file():
        found: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
        return found
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with status {done.returncode} and no message (out of memory?)"


def _row(method: Method, found: dict[str, Any], first: dict[str, Any]) -> Row:
    nll, weights = found["window_nll"], found["window_tokens"]
    infinite = any(value is None for value in nll)  # what NaN becomes in JSON
    return Row(
        label=method.label,
        kind=method.kind,
        weight_bytes=found["weight_bytes"],
        run_bytes=found["run_bytes"],
        run_bytes_with_loading=found["run_bytes_with_loading"],
        speed=found["speed"],
        ppl=found["ppl"],
        ppl_loss=None if infinite else perplexity_loss(first["window_nll"], nll, weights),
        accuracy=_accuracy(first["items"], found["items"]),
        layer_error=tuple(float("nan") if value is None else value for value in found["layer_error"]),
    )


def _accuracy(base: list[dict[str, Any]], other: list[dict[str, Any]]) -> PairedLoss | None:
    """Mean accuracy over tasks against float; None without tasks, or where float got nothing right."""
    pairs = list(zip(map(_items, base), map(_items, other), strict=True))
    if not pairs or not any(entry.score > 0 for entry, _ in pairs):
        return None
    for mine, theirs in pairs:
        if mine.ids != theirs.ids:
            raise Int4Error(f"report: {mine.task} asked two models different things")
    return scores.mean_accuracy(pairs)


def _items(data: dict[str, Any]) -> Items:
    return Items(data["task"], data["metric"], data["kind"], tuple(data["ids"]), tuple(data["values"]))
