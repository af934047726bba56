"""Progress of long work: one line on the standard error output with a count and the time left.

By default it is shown where that output is a terminal, so that logs and pipes stay clean.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

ItemT = TypeVar("ItemT")

_LINE = "torch_int4: {desc}{n_fmt}/{total_fmt}{unit} |{bar:20}| {elapsed}, {remaining} left"


class ProgressLine:
    """A line that counts up to `total`. It ends with the count that was reached, also after an error.

    Args:
        total: how many there are; none at all are no line.
        unit: of what, in the plural: "linears".
        title: what comes before the count.
        show: None for "on a terminal".
        done: how many of them were done before; they do not count for the pace.
    """

    def __init__(self, total: int, unit: str, *, title: str = "", show: bool | None = None, done: int = 0) -> None:
        self._line: Any = None
        if total and wanted(show):
            self._line = _line(total=total, initial=done, unit=f" {unit}", desc=f"{title} ".lstrip())

    def advance(self) -> None:
        """One more is done."""
        if self._line is not None:
            self._line.update()

    def reach(self, done: int) -> None:
        """So many are done, fewer than before where the work begins anew."""
        if self._line is not None:
            self._line.update(done - self._line.n)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._line is not None:
            self._line.close()


def wanted(show: bool | None) -> bool:
    """`show`, or where it is None, whether the standard error output is a terminal."""
    return (sys.stderr is not None and sys.stderr.isatty()) if show is None else show


def track(items: Sequence[ItemT], unit: str, *, title: str = "", show: bool | None = None) -> Iterator[ItemT]:
    """The items one by one, each counted when the next one is asked for; arguments as of `ProgressLine`."""
    with ProgressLine(len(items), unit, title=title, show=show) as progress:
        for item in items:
            yield item
            progress.advance()


def tell(text: str, show: bool | None = None) -> None:
    """Write a line about a finished step."""
    if wanted(show):
        print(f"torch_int4: {text}", file=sys.stderr, flush=True)


def _line(**arguments: Any) -> Any:
    from tqdm import tqdm

    class Line(tqdm):
        monitor_interval = 0  # no thread that looks for lines which have not moved

    return Line(bar_format=_LINE, file=sys.stderr, dynamic_ncols=True, mininterval=0.2, **arguments)
