"""Shows a run of the bench: a table, markdown, JSON, and the roofline plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from torch_int4.evals.bench.roofline import ISSUE, Roofline
from torch_int4.evals.bench.run import Result, Row
from torch_int4.evals.figures import new_figure, require_matplotlib
from torch_int4.support.markdown import markdown_table

if TYPE_CHECKING:
    from torch_int4.evals.bench import attention

HEADER = (
    "weight",
    "rows",
    "compute",
    "who",
    "kernels",
    "min ms",
    "median",
    "GB/s",
    "GOP/s",
    "of read",
    "of issue",
    "x best peer",
    "of roof",
)
_LEFT = ("weight", "compute", "who", "kernels", "x best peer", "of roof")
_NOISY, _BUSY = 1.5, 0.5


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of HEADER."""
    peer = "" if row.speedup is None else f"{row.speedup:.2f} {row.best_peer}"
    roof = "" if row.of_roof is None else f"{row.of_roof:.0%} {row.roof}"
    return (
        row.point.weight.label,
        str(row.point.rows),
        row.point.compute if row.ours else "",
        row.contestant,
        row.kernels,
        f"{row.min_s * 1e3:.3f}",
        f"{row.median_s * 1e3:.3f}",
        f"{row.gb_s:.1f}",
        f"{row.gop_s:.1f}",
        "" if row.of_read is None else f"{row.of_read:.0%}",
        "" if row.of_issue is None else f"{row.of_issue:.0%}",
        peer,
        roof,
    )


def table(result: Result) -> Table:
    """Every contestant of every point; a rule between points."""
    return table_by_point(result.rows, HEADER, _LEFT, cells)


def table_by_point(
    rows: Sequence[Any], header: Sequence[str], left: Sequence[str], cells: Callable[[Any], tuple[str, ...]]
) -> Table:
    """Rows as a table with a gap between points, ours in bold; columns not in `left` are flush right."""
    shown = Table(box=None, pad_edge=False)
    for name in header:
        shown.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    previous = None
    for row in rows:
        if previous is not None and row.point != previous:
            shown.add_row()
        shown.add_row(*cells(row), style="bold" if row.ours else "")
        previous = row.point
    return shown


def roof_lines(roofline: Roofline) -> Iterator[str]:
    """The limits of the machine, a line each."""
    for pages, (speed, streams, prefetch) in roofline.read.items():
        how = f"{streams} streams a thread" + (f", prefetch {prefetch} bytes ahead" if prefetch else "")
        yield f"read, {pages} pages: {speed / 1e9:.1f} GB/s ({how})"
    if roofline.huge_granted < 0.9:
        yield f"note: only {roofline.huge_granted:.0%} of the buffer got 2 MiB pages"
    for name, peak in roofline.peaks.items():
        yield f"{name}: {peak / 1e9:.0f} " + ("billion instructions a second" if name == ISSUE else "GOP/s")


def machine_lines(result: Result | attention.Result, what: str = "weights") -> Iterator[str]:
    """Where and with what the figures were taken, and whether they may be quoted; `what` rotates in memory."""
    machine = result.machine
    where = f"{machine['cpu']}, {machine['threads']} threads of {machine['cpus']} CPUs"
    yield f"{where}, load {machine['load']} before the run"
    yield (
        f"torch_int4 {machine['version']}, torch {machine['torch']}; {what} rotate through "
        f"{machine['rotate_bytes'] / 2**20:.0f} MiB"
    )
    noisy = sum(row.median_s > _NOISY * row.min_s for row in result.rows)
    if machine["load"] > _BUSY or noisy:
        yield (
            f"note: other work runs here (load {machine['load']} before the run; median over {_NOISY} times the "
            f"minimum in {noisy} of {len(result.rows)} rows): do not quote these figures"
        )
    bandwidth = result.roofline.bandwidth().per_second
    if cached := [row for row in result.rows if row.nbytes / row.min_s > 1.05 * bandwidth]:
        names = ", ".join(sorted({row.contestant for row in cached}))
        yield f"note: {len(cached)} rows beat the read bandwidth, so their {what} came from a cache: {names}"


def markdown(result: Result) -> str:
    """The whole report as markdown."""
    lines = [*machine_lines(result), *roof_lines(result.roofline)]
    rows = [cells(row) for row in result.rows]
    return "\n".join(f"- {line}" for line in lines) + "\n\n" + markdown_table(HEADER, rows) + "\n"


def roofs(roofline: Roofline) -> dict[str, Any]:
    """The limits of the machine as plain data."""
    read = {
        pages: {"bytes_per_s": speed, "streams": streams, "prefetch": prefetch}
        for pages, (speed, streams, prefetch) in roofline.read.items()
    }
    return {"read": read, "huge_pages_granted": roofline.huge_granted, "operations_per_s": roofline.peaks}


def as_json(result: Result) -> dict[str, Any]:
    """Everything as plain data; seconds, bytes and operations without prefixes, except where the name says so."""
    rows = []
    for row in result.rows:
        data = {name: value for name, value in vars(row).items() if name != "point"}
        point = vars(row.point.weight) | {"rows": row.point.rows, "compute": row.point.compute}
        rows.append(point | data | {"gb_s": row.gb_s, "gop_s": row.gop_s, "of_read": row.of_read})
    return {"machine": result.machine, "roofs": roofs(result.roofline), "rows": rows}


def plot(result: Result, path: str | Path) -> None:
    """Writes the roofline plot: operations per byte of weight against GOP/s, both logarithmic.

    Raises:
        Int4Error: if matplotlib is not installed.
    """
    require_matplotlib("--plot")
    figure = new_figure(11, 7)
    axes = figure.add_subplot(xscale="log", yscale="log")
    xs = [row.point.operations / row.nbytes for row in result.rows]
    left, right = min(xs) / 1.6, max(xs) * 1.6
    _draw_roofs(axes, result, left, right)
    names = list(dict.fromkeys((row.ours, row.contestant) for row in result.rows))
    for index, (is_ours, name) in enumerate(sorted(names, reverse=True)):
        rows = [row for row in result.rows if row.contestant == name]
        axes.scatter(
            [row.point.operations / row.nbytes for row in rows],
            [row.gop_s for row in rows],
            s=70 if is_ours else 32,
            marker="o" if is_ours else "^sDvP*X"[index % 7],
            color=f"C{index % 10}",
            edgecolors="black" if is_ours else "none",
            linewidths=0.8,
            zorder=4 if is_ours else 3,
            label=name,
        )
    _label_rows(axes, result)
    axes.set(xlim=(left, right), xlabel="operations per byte of weight", ylabel="GOP/s (best of the run)")
    axes.set_title("\n".join(list(machine_lines(result))[:2]), fontsize=9)
    axes.grid(which="major", alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(path, dpi=140)


def _draw_roofs(axes: Any, result: Result, left: float, right: float) -> None:
    """Bandwidth as slopes up to the highest peak; the peaks that rows were held against as horizontals."""
    roofline = result.roofline
    used = {row.roof: row for row in result.rows if row.roof}
    limits = {peak.name: peak for row in used.values() if (peak := roofline.peak(row.kernels, row.point.compute))}
    highest = max([limit.per_second for limit in limits.values()], default=max(roofline.peaks.values()))
    for style, (pages, (speed, *_)) in zip(("-", "--"), sorted(roofline.read.items()), strict=False):
        end = min(right, highest / speed)
        axes.plot([left, end], [left * speed / 1e9, end * speed / 1e9], style, color="gray", linewidth=1.2)
        above = style == "-"
        at = left * (end / left) ** (0.6 if above else 0.4)
        axes.annotate(
            f"{speed / 1e9:.0f} GB/s, {pages} pages",
            (at, at * speed / 1e9),
            xytext=(-6, 4) if above else (6, -4),
            textcoords="offset points",
            fontsize=8,
            color="gray",
            ha="right" if above else "left",
            va="bottom" if above else "top",
        )
    slope = max(speed for speed, *_ in roofline.read.values())
    for limit in limits.values():
        start = max(left, limit.per_second / slope)
        axes.plot([start, right], [limit.per_second / 1e9] * 2, color="gray", linewidth=1.2)
        text = f"{limit.name}: {limit.per_second / 1e9:.0f} GOP/s"
        axes.annotate(
            text,
            (right, limit.per_second / 1e9),
            xytext=(-4, 3),
            textcoords="offset points",
            fontsize=8,
            color="gray",
            ha="right",
            va="bottom",
        )


def _label_rows(axes: Any, result: Result) -> None:
    """M above the best of our points of each number of rows."""
    best: dict[int, Row] = {}
    for row in result.rows:
        if row.ours and (row.point.rows not in best or row.gop_s > best[row.point.rows].gop_s):
            best[row.point.rows] = row
    for rows, row in best.items():
        axes.annotate(
            f"M={rows}",
            (row.point.operations / row.nbytes, row.gop_s),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            fontweight="bold",
        )
