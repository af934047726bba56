"""Figures by matplotlib, which is optional, drawn without a display."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch_int4.errors import Int4Error


def require_matplotlib(options: str) -> None:
    """Raises Int4Error if nothing can be drawn here; `options` are those of the command that ask for plots."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Int4Error(f"plots need matplotlib: pip install matplotlib, or leave out {options}")


def new_figure(width: float, height: float) -> Any:
    """An empty figure, inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
