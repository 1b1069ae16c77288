"""The demo's figure: training loss against LoRA's with the knots marked, held-out loss with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report import style
from experiments.study.arms import CEILING, REFERENCE
from experiments.study.comparison import Results, Row, inside

_STYLES = {
    "lora": (style.BLACK, "-", "o"),
    "cola-2": (style.BLUE, "-", "s"),
    "cola-3": (style.VERMILION, "-", "^"),
    "cola-plateau": (style.GREEN, "--", "D"),
    "cola-stepdown": (style.PURPLE, "-.", "v"),
    "lora-wide": (style.SKY, ":", "P"),
    "full": (style.GREY, "--", "X"),
}


def draw(results: Results, rows: Sequence[Row], path: Path) -> None:
    """Write the figure as a PNG to `path`.

    Left: bits per byte on the training text, averaged over seeds and smoothed. Middle: the difference from LoRA at the
    same step. Every arm sees the same text at the same step, so the variation of the text cancels. This panel is scaled
    to the adapters' arms, and left out without LoRA. Right: the table's held-out losses.
    """
    pyplot = style.pyplot()
    labels = {row.arm: row.label for row in rows}
    compared = REFERENCE in labels and len(labels) > 1
    with pyplot.rc_context(style.SETTINGS):
        figure, panels = pyplot.subplots(1, 2 + compared, figsize=(9.5 + 4.5 * compared, 4.6), layout="constrained")
        _curves(panels[0], results, labels, None)
        if compared:
            _curves(panels[1], results, labels, REFERENCE)
        _held_out(panels[-1], results, rows)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over a window of `width` steps that ends at each step; shorter at the start."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - width)
    return (total[end] - total[start]) / (end - start)


def _curves(axes: Any, results: Results, labels: Mapping[str, str], reference: str | None) -> None:
    losses = {arm: results.scale * np.mean([out["losses"] for out in results.final(arm)], axis=0) for arm in labels}
    steps = len(next(iter(losses.values())))
    width = max(1, steps // 10)
    shown = []
    for arm, values in losses.items():
        color, line, marker = _STYLES[arm]
        curve = smooth(values if reference is None else values - losses[reference], width)
        axes.plot(np.arange(1, steps + 1), curve, color=color, linestyle=line, linewidth=1.6, label=labels[arm])
        ties = sorted({knot["step"] for outcome in results.final(arm) for knot in inside(outcome)})
        axes.plot(ties, curve[[tie - 1 for tie in ties]], marker, color=color, markersize=7, markeredgecolor="white")
        if reference is None or arm != CEILING or len(losses) == 2:
            shown.append(curve[width:])
    if width < steps:  # only means over a full window: the first steps vary the most
        low, high = min(map(np.min, shown)), max(map(np.max, shown))
        margin = 0.08 * (high - low) or 0.01
        axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("optimizer step")
    if reference is None:
        axes.set_ylabel("bits per byte")
        axes.set_title(f"Training loss (mean of {width} steps; markers: knots)", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8.5)
    else:
        axes.set_ylabel("bits per byte")
        axes.set_title(f"Training loss minus {labels[reference]}'s", loc="left", fontsize=10)


def _held_out(axes: Any, results: Results, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    for place, row in zip(places, rows):
        color, _, marker = _STYLES[row.arm]
        spread = 0.0 if math.isnan(row.test.low) else row.test.half_width
        axes.errorbar(
            row.test.mean,
            place,
            xerr=spread,
            fmt=marker,
            color=color,
            markersize=7,
            capsize=4,
            elinewidth=1.4,
        )
        axes.plot(results.losses(row.arm), [place - 0.22] * len(results.losses(row.arm)), ".", color=color, alpha=0.5)
        axes.annotate(
            f"{row.test.mean:.3f}", (row.test.mean, place), xytext=(0, -14), textcoords="offset points",
            ha="center", fontsize=8, color="#333333",
        )  # fmt: skip
    for arm, line in ((REFERENCE, "-"), (CEILING, "--")):
        for row in rows:
            if row.arm == arm:
                axes.axvline(row.test.mean, color=_STYLES[arm][0], linestyle=line, linewidth=0.8, alpha=0.5, zorder=0)
    axes.set_yticks(list(places), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel("held-out bits per byte")
    axes.set_title("Unseen topics (95 % t interval; dots: seeds)", loc="left", fontsize=10)
