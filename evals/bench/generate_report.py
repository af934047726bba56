"""Shows a run of the whole-model bench: tables as text and markdown, JSON, and plots."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch_int4.evals.bench.generate import Result, Row
from torch_int4.evals.figures import new_figure, require_matplotlib
from torch_int4.support.markdown import markdown_table

HEADER = ("engine", "decode tok/s", "median", "x", "of read", "prefill tok/s", "weights MB", "loaded", "peak", "what")
OURS = "torch_int4"
BUSY, NOISY = 0.5, 1.3


def table(result: Result) -> list[tuple[str, ...]]:
    """A line for each engine that ran, in the order of HEADER."""
    return [cells(row, result) for row in result.rows if row.decode]


def cells(row: Row, result: Result) -> tuple[str, ...]:
    """Speeds of the best and of the median round, times over this package's engine, memory in MB."""
    best, median = row.decode_tps()
    mine = next((other for other in result.rows if other.engine == OURS and other.decode), None)
    times = "" if mine is None or mine is row else f"{mine.decode_tps()[1] / median:.2f}"
    prefill = f"{result.plan.prefill / min(row.prefill):.0f}" if row.prefill else ""
    return (
        row.engine,
        f"{best:.1f}",
        f"{median:.1f}",
        times,
        f"{row.of_bandwidth():.0%}",
        prefill,
        f"{row.loaded.weight_bytes / 1e6:.0f}",
        f"{row.loaded.resident / 1e6:.0f}",
        f"{row.peak / 1e6:.0f}",
        row.loaded.version,
    )


def batch_table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tokens per second of all sequences together; the header and a line for each engine."""
    header = ["engine", "1 sequence", *(f"{batch} sequences" for batch in result.plan.batches)]
    rows = []
    for row in result.rows:
        if row.batches:
            speeds = [f"{batch / min(taken):.1f}" for batch, taken in row.batches.items()]
            rows.append([row.engine, f"{row.decode_tps()[0]:.1f}", *speeds, *[""] * (len(header) - 2 - len(speeds))])
    return header, rows


def context_table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Milliseconds of the median token by tokens in the cache."""
    contexts = sorted(result.plan.contexts)
    rows = []
    for row in result.rows:
        if row.contexts:
            times = [row.contexts.get(length) for length in contexts]
            rows.append([row.engine, *("" if t is None else f"{statistics.median(t) * 1e3:.2f}" for t in times)])
    return ["ms a token at", *map(str, contexts)], rows


def profile_table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Where the time of a token goes."""
    found = result.profile
    header = ["of a token", "calls", "ms", "share"]
    if found is None:
        return header, []
    rows = [
        [name, f"{calls:.0f}" if calls else "", f"{seconds * 1e3:.3f}", f"{seconds / found.token_s:.0%}"]
        for name, calls, seconds in found.rows()
    ]
    return header, [*rows, ["a whole token, undisturbed", "", f"{found.token_s * 1e3:.3f}", ""]]


def speculation_table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Decoding with guesses against plain decoding."""
    header = ["decoding", "tok/s best", "median", "speed-up", "tokens a step", "same tokens"]
    return header, [
        [
            row.how,
            f"{row.new_tokens / row.min_s:.1f}",
            f"{row.new_tokens / row.median_s:.1f}",
            f"{row.speedup:.2f}",
            f"{row.tokens_a_step:.2f}",
            "yes" if row.same else "no",
        ]
        for row in result.speculation
    ]


def tables(result: Result) -> Iterator[tuple[Sequence[str], Sequence[Sequence[str]]]]:
    """Every table that has lines."""
    for header, rows in (
        (HEADER, table(result)),
        batch_table(result),
        context_table(result),
        profile_table(result),
        speculation_table(result),
    ):
        if rows:
            yield header, rows


def lines(result: Result) -> Iterator[str]:
    """Where and with what the figures were taken, whether they may be quoted, and who did not take part."""
    machine = result.machine
    slow, fast = result.bandwidths()
    yield (
        f"{result.shape}: {machine['cpu']}, {machine['threads']} threads of {machine['cpus']} CPUs, load "
        f"{machine['load']} before the run; torch_int4 {machine['version']}, torch {machine['torch']}; read "
        f"bandwidth {slow / 1e9:.1f} to {fast / 1e9:.1f} GB/s around the rounds"
    )
    yield (
        "x is this package's median speed over the engine's; of read is the time to read its weights once, at the "
        "bandwidth just before or after a round, over a token of it, in the median; loaded and peak are resident MB "
        "after loading and while running"
    )
    noisy = [row.engine for row in result.rows if row.decode and _is_noisy(row)]
    if machine["load"] > BUSY or noisy:
        where = f"; rounds differ by over {NOISY} for {', '.join(noisy)}" if noisy else ""
        yield f"note: other work runs here (load {machine['load']} before the run{where}): do not quote these figures"
    for row in result.rows:
        if row.failed:
            yield f"{row.engine} failed: {row.failed}"
    for name, why in result.left_out.items():
        yield f"not compared: {name}: {why}"


def _is_noisy(row: Row) -> bool:
    return statistics.median(row.decode) > NOISY * min(row.decode)


def markdown(result: Result) -> str:
    """The whole report."""
    parts = ["\n".join(f"- {line}" for line in lines(result))]
    parts += [markdown_table(header, rows) for header, rows in tables(result)]
    return "\n\n".join(parts) + "\n"


def as_json(result: Result) -> dict[str, Any]:
    """Everything as plain data; seconds and bytes."""
    data = asdict(result)
    for row, entry in zip(result.rows, data["rows"], strict=True):
        if row.decode:
            best, median = row.decode_tps()
            entry |= {"decode_tps": best, "decode_tps_median": median}
            entry["of_bandwidth"] = row.of_bandwidth()
    if result.profile is not None:
        data["profile"]["rows"] = result.profile.rows()
    return data


def plot(results: Sequence[Result], path: str | Path) -> None:
    """Bars of decode and prefill by engine, time against context, and against bytes of weights where shapes differ.

    What was not measured is left out.

    Raises:
        Int4Error: if matplotlib is not installed.
    """
    require_matplotlib("--plot")
    rows = [row for result in results for row in result.rows]
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row.engine for row in rows))}
    panels: list[Callable[[Any], None]] = []
    if any(row.decode for row in rows):
        panels.append(lambda axes: _bars(axes, results, colors, "decode tok/s", lambda row, _: row.decode_tps()[1]))
    if any(row.prefill for row in rows):
        panels.append(lambda axes: _bars(axes, results, colors, "prefill tok/s", _prefill))
    if any(row.contexts for row in rows):
        panels.append(lambda axes: _growth(axes, results, colors))
    if len({result.shape for result in results if any(row.decode for row in result.rows)}) > 1:
        panels.append(lambda axes: _sizes(axes, results, colors))
    columns = min(2, len(panels)) or 1
    lines_of_panels = -(-len(panels) // columns) or 1
    figure = new_figure(6.5 * columns, 4.5 * lines_of_panels)
    places = list(figure.subplots(lines_of_panels, columns, squeeze=False).flat)
    for draw, axes in zip(panels, places, strict=False):
        draw(axes)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(next(lines(results[0])).split(": ", 1)[1], fontsize=9)
    figure.savefig(path, dpi=120)


def _prefill(row: Row, result: Result) -> float:
    return result.plan.prefill / min(row.prefill) if row.prefill else 0.0


def _bars(axes: Any, results: Sequence[Result], colors: dict[str, str], title: str, value: Any) -> None:
    entries = [
        (f"{row.engine}\n{r.shape}", value(row, r), colors[row.engine]) for r in results for row in r.rows if row.decode
    ]
    names, values, shades = zip(*entries, strict=True)
    bars = axes.barh(range(len(names)), values, color=shades)
    axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)  # for the numbers behind the bars
    axes.set_title(title, fontsize=10)


def _growth(axes: Any, results: Sequence[Result], colors: dict[str, str]) -> None:
    """Time of a token against what lies in the cache."""
    for result in results:
        for row in result.rows:
            if row.contexts:
                times = [statistics.median(row.contexts[length]) * 1e3 for length in sorted(row.contexts)]
                label = f"{row.engine}, {result.shape}"
                axes.plot(sorted(row.contexts), times, "o-", color=colors[row.engine], label=label)
    axes.set(xlabel="tokens in the cache", ylabel="ms a token", ylim=(0, None))
    axes.legend(fontsize=8)


def _sizes(axes: Any, results: Sequence[Result], colors: dict[str, str]) -> None:
    """Time of a token against the bytes of the weights, and the line that reading them draws."""
    sizes: list[float] = []
    names: dict[float, tuple[str, float]] = {}
    for result in results:
        for row in result.rows:
            if row.decode:
                size, milliseconds = row.loaded.weight_bytes / 1e9, statistics.median(row.decode) * 1e3
                label = row.engine if row.engine not in axes.get_legend_handles_labels()[1] else None
                axes.scatter(size, milliseconds, color=colors[row.engine], label=label)
                if row is result.rows[0]:
                    names[size] = (result.shape, milliseconds)
                sizes.append(size)
    # Where sizes are nearly the same, names lie on different sides.
    sides: list[dict[str, Any]] = [
        {"xytext": (7, -7), "va": "top"},
        {"xytext": (-7, 7), "ha": "right"},
        {"xytext": (-8, 0), "ha": "right", "va": "center"},
    ]
    for i, (size, (shape, milliseconds)) in enumerate(sorted(names.items())):
        axes.annotate(shape, (size, milliseconds), textcoords="offset points", fontsize=7, **sides[i % 3])
    seen = [speed / 1e9 for result in results for row in result.rows for speed in row.read]
    ends = [min(sizes) * 0.8, max(sizes) * 1.2]
    for bandwidth in sorted({round(min(seen)), round(max(seen))}):
        axes.plot(ends, [size / bandwidth * 1e3 for size in ends], "--", color="gray", lw=1, zorder=0)
        axes.annotate(f"{bandwidth} GB/s", (ends[0], ends[0] / bandwidth * 1e3), fontsize=7, va="top")
    axes.set(xscale="log", yscale="log", xlabel="GB of weights that a token reads", ylabel="ms a token")
    axes.legend(fontsize=8)
