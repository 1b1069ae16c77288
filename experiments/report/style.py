"""The colours and settings that all figures share."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's palette, distinguishable with any colour vision; line styles and markers repeat the distinction
BLACK, GREY = "#000000", "#7F7F7F"
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
VERMILION, ORANGE, PURPLE = "#D55E00", "#E69F00", "#CC79A7"

SETTINGS = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}
"""For `pyplot.rc_context`."""


def pyplot() -> Any:
    """`matplotlib.pyplot`, set to draw into files without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
