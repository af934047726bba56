"""Shows a run of the attention bench: a table, markdown and JSON."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from torch_int4.evals.bench.attention import Result, Row
from torch_int4.evals.bench.report import machine_lines, roof_lines, roofs, table_by_point
from torch_int4.support.markdown import markdown_table

HEADER = ("point", "who", "cache", "min us", "median", "GB/s", "GOP/s", "x torch", "of read")
_LEFT = ("point", "who", "cache")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of HEADER."""
    appends = row.point.kind == "append"
    return (
        row.point.label,
        row.contestant,
        row.cache,
        f"{row.min_s * 1e6:.1f}",
        f"{row.median_s * 1e6:.1f}",
        "" if appends else f"{row.gb_s:.1f}",
        "" if appends else f"{row.gop_s:.1f}",
        "" if row.speedup is None else f"{row.speedup:.2f}",
        "" if row.of_read is None else f"{row.of_read:.0%}",
    )


def table(result: Result) -> Table:
    """Every contestant of every point; a rule between points."""
    return table_by_point(result.rows, HEADER, _LEFT, cells)


def markdown(result: Result) -> str:
    """The whole report as markdown."""
    lines = [*machine_lines(result, "caches"), *roof_lines(result.roofline)]
    rows = [cells(row) for row in result.rows]
    return "\n".join(f"- {line}" for line in lines) + "\n\n" + markdown_table(HEADER, rows) + "\n"


def as_json(result: Result) -> dict[str, Any]:
    """Everything as plain data; seconds, bytes and operations without prefixes, except where the name says so."""
    rows = []
    for row in result.rows:
        data = {name: value for name, value in vars(row).items() if name != "point"}
        rows.append(vars(row.point) | data | {"gb_s": row.gb_s, "gop_s": row.gop_s, "of_read": row.of_read})
    return {"machine": result.machine, "roofs": roofs(result.roofline), "rows": rows}
