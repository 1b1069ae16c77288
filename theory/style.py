"""The style of all pictures: colours, sizes, and an empty figure.

The colours are those of Okabe and Ito, which people with any colour vision can tell apart; curves also differ
by marker or dash. Figures avoid pyplot and its global state, and matplotlib is imported only to draw.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
GREY = "#7F7F7F"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "savefig.dpi": 130,
}


def canvas(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with a flat list of its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def mosaic(layout: list[list[str]], width: float, height: float) -> tuple[Any, dict[str, Any]]:
    """A figure with its axes by name, laid out as matplotlib's `subplot_mosaic`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplot_mosaic(layout)


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Run a whole drawing in this style; legends and ticks read it when they are made."""

    @wraps(draw)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped
