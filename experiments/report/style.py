"""The colours and settings that all figures share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, distinguishable with any colour vision; line styles and markers repeat the distinction
BLACK, GREY = "#000000", "#7F7F7F"
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
VERMILION, ORANGE, PURPLE = "#D55E00", "#E69F00", "#CC79A7"

SETTINGS = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}
"""For `pyplot.rc_context`."""


def picture(path: Path, draw: Callable[[Path], object]) -> str:
    """Draw a picture after everything else is printed and written; without matplotlib the reason stands for its path.

    >>> picture(Path("x.png"), lambda path: None)
    'x.png'
    """
    try:
        draw(path)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return "no picture: matplotlib is missing (pip install matplotlib)"
    return str(path)


def pyplot() -> Any:
    """`matplotlib.pyplot`, set to draw into files without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
