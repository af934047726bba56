"""The report's three plots as PNG: size against accuracy, speed against accuracy, error per layer."""

from __future__ import annotations

import io
import math
from typing import Any

from torch_int4.evals.figures import new_figure, require_matplotlib
from torch_int4.evals.report.run import Report, Row

OPTIONS = "--png and --html"
_MARKERS = {"float": "s", "int4": "o", "peer": "^"}


def draw(report: Report) -> dict[str, bytes]:
    """PNG files by name: ``size-accuracy``, ``speed-accuracy`` and ``error-per-layer``.

    Raises:
        Int4Error: matplotlib is not installed.
    """
    require_matplotlib(OPTIONS)
    size, speed, layers = ((figure, figure.add_subplot()) for figure in (new_figure(8, 5) for _ in range(3)))
    for index, row in enumerate(row for row in report.rows if row.error is None):
        color = f"C{index % 10}"
        if row.weight_bytes is not None:
            _point(size[1], row, row.weight_bytes / 2**20, color)
        if row.speed is not None:
            _point(speed[1], row, row.speed["decode_best"], color)
        if row.kind != "float" or row.label != "float32":
            values = [value if value > 0 else math.nan for value in row.layer_error]
            layers[1].plot(range(len(values)), values, color=color, label=row.label, linewidth=1.3)
    _finish(size, "weights, MiB", "perplexity", f"{report.model}: size and accuracy")
    _finish(speed, "decode, tokens per second (best of the run)", "perplexity", f"{report.model}: speed and accuracy")
    layers[1].set_yscale("log")
    title = f"{report.model}: relative error of the hidden states"
    _finish(layers, "layers passed (0: embeddings)", "||h - h float32|| / ||h float32||", title)
    found = {"size-accuracy": size, "speed-accuracy": speed, "error-per-layer": layers}
    return {name: _png(figure) for name, (figure, _) in found.items()}


def _point(axes: Any, row: Row, x: float, color: str) -> None:
    """Perplexity of a row, with the paired error of its rise over float."""
    if row.ppl is None:
        return
    loss = row.ppl_loss
    error = loss.base * loss.stderr if loss is not None and math.isfinite(loss.stderr) else 0.0
    axes.errorbar(x, row.ppl, yerr=error, color=color, marker=_MARKERS[row.kind], capsize=3, label=row.label)


def _finish(drawn: tuple[Any, Any], x: str, y: str, title: str) -> None:
    axes = drawn[1]
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()
