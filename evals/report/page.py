"""Shows a report: markdown, JSON, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch_int4.evals.report.run import Report, Row
from torch_int4.support.markdown import markdown_table

HEADER = (
    "method",
    "weights MiB",
    "run MiB",
    "prefill tok/s",
    "decode tok/s",
    "perplexity",
    "rise",
    "± paired",
    "mean accuracy",
    "loss",
    "± paired",
)
CAPTIONS = {
    "size-accuracy": "Bytes of weights against perplexity; bars are paired standard errors of the rise over float32.",
    "speed-accuracy": "Decode speed against perplexity.",
    "error-per-layer": "How far the hidden states are from those of float32, layer by layer.",
}


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of HEADER; what was not measured is empty."""
    if row.error is not None:
        return (row.label, f"not measured: {row.error[:120]}", *[""] * (len(HEADER) - 2))
    speed, rise, accuracy = row.speed or {}, row.ppl_loss, row.accuracy
    return (
        row.label,
        _mib(row.weight_bytes),
        _mib(row.run_bytes) + ("*" if row.run_bytes_with_loading else ""),
        f"{speed['prefill_best']:.1f}" if speed else "",
        f"{speed['decode_best']:.1f}" if speed else "",
        "NaN" if row.ppl is None else f"{row.ppl:.3f}",
        f"{rise.loss:+.2%}" if rise else "",
        f"{rise.stderr:.2%}" if rise else "",
        f"{accuracy.score:.4f}" if accuracy else "",
        f"{accuracy.loss:+.2%}" if accuracy else "",
        f"{accuracy.stderr:.2%}" if accuracy else "",
    )


def notes(report: Report) -> Iterator[str]:
    """How the figures were taken, a line each."""
    info, settings = report.info, report.settings
    yield (
        f"{report.model}; torch_int4 {info['version']}, torch {info['torch']}, kernels {info['isa']}, "
        f"{settings.get('threads') or info['threads']} threads"
    )
    yield (
        f"speed: best of {settings.get('repeats', 3)} greedy generations of {settings.get('new_tokens', 32)} tokens "
        f"after a prompt of {settings.get('prompt_tokens', 128)}, one process after the other"
    )
    yield "weights: parameters and buffers, each storage once; run: largest resident memory while generating"
    if any(row.run_bytes_with_loading for row in report.rows):
        yield "*: this system cannot leave out the peak of loading, which holds the float model"
    yield (
        f"perplexity: {settings.get('tokens', 2048)} tokens of {settings.get('text') or 'built-in English'} in windows "
        f"of {settings.get('window', 512)}; rise and its error are paired with float32 by window"
    )
    if tasks := settings.get("tasks"):
        limit = settings.get("limit")
        what = "all items" if limit is None else f"the first {limit} items"
        yield f"mean accuracy: {', '.join(tasks)}, {what} of each; loss is relative to float32, paired by item"


def markdown(report: Report) -> str:
    """The whole report as markdown."""
    lines = "\n".join(f"- {line}" for line in notes(report))
    return f"{lines}\n\n{markdown_table(HEADER, [cells(row) for row in report.rows])}\n"


def as_json(report: Report) -> dict[str, Any]:
    """Everything as plain data."""
    return dataclasses.asdict(report)


def page(report: Report, plots: Mapping[str, bytes]) -> str:
    """One HTML document with the table and the plots inside, without scripts or links."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return pages.get_template("page.html.jinja").render(
        title=f"{report.model}: float, int4 and peers on this machine",
        header=HEADER,
        rows=report.rows,
        cells=cells,
        notes=notes(report),
        figures=[(CAPTIONS[name], base64.b64encode(png).decode()) for name, png in plots.items()],
    )


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f}"
