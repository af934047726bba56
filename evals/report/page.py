"""Shows a report: markdown, JSON, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Iterator, Mapping
from typing import Any

from torch_int4.evals import output
from torch_int4.evals.report.run import Report, Row

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
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}td,th{padding:.3rem .6rem;text-align:right;
border-bottom:1px solid #ddd;white-space:nowrap}td:first-child,th:first-child{text-align:left}tr.int4{font-weight:600}
tr.failed td{color:#a00}figure{margin:2rem 0}img{max-width:100%}figcaption,li{color:#555;font-size:13px}"""


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
    return f"{lines}\n\n{output.markdown_table(HEADER, [cells(row) for row in report.rows])}\n"


def as_json(report: Report) -> dict[str, Any]:
    """Everything as plain data."""
    return dataclasses.asdict(report)


def page(report: Report, plots: Mapping[str, bytes]) -> str:
    """One HTML document with the table and the plots inside, without scripts or links."""
    title = html.escape(f"{report.model}: float, int4 and peers on this machine")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADER)
    body = "".join(_html_row(row) for row in report.rows)
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in notes(report))
    figures = "".join(_figure(name, png) for name, png in plots.items())
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>\n'
        f"<h1>{title}</h1>\n<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>\n<ul>{lines}</ul>\n"
        f"{figures}</html>\n"
    )


def _html_row(row: Row) -> str:
    if row.error is not None:
        reason = html.escape(row.error)
        return f'<tr class="failed"><td>{html.escape(row.label)}</td><td colspan="{len(HEADER) - 1}">{reason}</td></tr>'
    shown = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row))
    return f'<tr class="{row.kind}">{shown}</tr>'


def _figure(name: str, png: bytes) -> str:
    caption = html.escape(CAPTIONS[name])
    image = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{image}"><figcaption>{caption}</figcaption></figure>'
    )


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f}"
