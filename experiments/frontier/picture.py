"""The pictures of the frontier, of the number of links, and of the demo."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.frontier.families import FAMILIES, FULL, family_of
from experiments.report import style
from experiments.report.stats import Interval
from experiments.study.comparison import Results, Row, inside

LINES = ("-", "--", ":", "-.")
"""Of curves, where colours and markers are used up."""


def draw_frontier(found: Sequence[Row], unit: str, path: Path) -> None:
    """Write held-out loss against bytes of trained state as a PNG, with 95 % intervals over seeds."""
    pyplot = style.pyplot()
    with pyplot.rc_context(style.SETTINGS):
        figure, axes = pyplot.subplots(figsize=(9.5, 4.8), layout="constrained")
        points(axes, found, unit)
        axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))  # clear of all curves
        axes.set_title("Held-out loss against memory: lower and further left is better", loc="left", fontsize=10)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def points(axes: Any, found: Sequence[Row], unit: str) -> None:
    """One curve per family over its ranks, and a point for full fine-tuning."""
    shown = set[str]()
    for name in dict.fromkeys(family_of(row.arm) for row in found):
        rows = sorted((row for row in found if family_of(row.arm) == name), key=lambda row: row.state_bytes)
        (color, line, marker), label = _look(rows[0].arm)
        sizes = [row.state_bytes / 1024 for row in rows]
        look = {"color": color, "linestyle": line, "marker": marker, "label": None if label in shown else label}
        _curve(axes, sizes, [row.test for row in rows], **look)
        shown.add(label)  # "b-random" and "b-random-2" are one method, at r and at 2r
        for row in rows if name == "lora" else ():
            axes.annotate(
                f"r = {row.arm.rpartition('-')[2]}", (row.state_bytes / 1024, row.test.mean), xytext=(7, 5),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("KiB of trained state (parameters, gradients, optimizer state)")
    axes.set_ylabel(f"held-out {unit}")
    axes.legend(frameon=False, fontsize=8.5)


def _curve(axes: Any, x: Sequence[float], intervals: Sequence[Interval], **look: Any) -> None:
    """Means with bars for their limits, where there are limits."""
    spread = [0.0 if math.isnan(limits.low) else limits.half_width for limits in intervals]
    means = [limits.mean for limits in intervals]
    axes.errorbar(x, means, yerr=spread, markersize=6, capsize=3, linewidth=1.4, **look)


def lengths(found: Sequence[Row]) -> dict[int, dict[int, Interval]]:
    """Paired differences from LoRA of chains of equal links of its rank and base: rank -> number of links -> it."""
    of: dict[int, dict[int, Interval]] = {}
    for row in found:
        family = FAMILIES.get(family_of(row.arm))
        if family is None or row.against is None:
            continue
        rank = int(row.arm.rpartition("-")[2])
        method = family.method(rank)
        if (method.kind, method.base, method.train, method.knots) == ("cola", "AdamW", "both", "even"):
            of.setdefault(rank, {})[method.links] = row.against.difference
    return of


def draw_lengths(differences: Mapping[int, Mapping[int, Interval]], unit: str, path: Path) -> None:
    """Write the loss of chains minus LoRA's against their number of links as a PNG, a curve per rank.

    Bars are 95 % intervals over seeds. Markers are the numbers of links that were run at this rank.

    Args:
        differences: see `lengths`.
        unit: of the losses.
        path: of the picture.
    """
    pyplot = style.pyplot()
    looks = [(style.BLUE, "o"), (style.VERMILION, "s"), (style.GREEN, "^"), (style.PURPLE, "D"), (style.ORANGE, "v")]
    counts = sorted({1, *(count for of in differences.values() for count in of)})
    with pyplot.rc_context(style.SETTINGS):
        figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
        axes.axhline(0, color=style.BLACK, linewidth=1.2, label="LoRA (one link)")
        for (rank, of), (line, (color, marker)) in zip(sorted(differences.items()), itertools.product(LINES, looks)):
            links = [1, *sorted(of)]
            intervals = [Interval(0.0, 0.0, 0.0), *(of[count] for count in links[1:])]
            _curve(axes, links, intervals, color=color, linestyle=line, marker=marker, label=f"r = {rank}")
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("links, of equal length")
        axes.set_ylabel(f"held-out {unit}, minus LoRA's")
        axes.set_title(
            "How many links? Below zero, a chain beats LoRA of the same memory (bars: 95 %)", loc="left", fontsize=10
        )
        axes.legend(frameon=False, fontsize=8.5)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def draw_demo(results: Results, found: Sequence[Row], path: Path) -> None:
    """Write the demo's picture as a PNG: training loss minus LoRA's with the knots, and the frontier's points.

    All arms see the same text at the same step, so the difference leaves out how the text varies. Curves are means over
    seeds and over a twentieth of the run.
    """
    pyplot = style.pyplot()
    with pyplot.rc_context(style.SETTINGS):
        figure, (curves, plane) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        reference, *others = found
        base = _mean_losses(results, reference.arm)
        width = max(1, len(base) // 20)
        curves.axhline(0, color=style.BLACK, linewidth=1.2, label=reference.label)
        for row in others:
            (color, line, marker), label = _look(row.arm)
            label = f"{label} (markers: knots)" if row.knots else row.label
            line = ":" if family_of(row.arm) == family_of(reference.arm) else line
            curve = smooth(_mean_losses(results, row.arm) - base, width)
            curves.plot(np.arange(width, len(curve) + 1), curve[width - 1 :], color=color, linestyle=line, label=label)
            ties = [knot["step"] for knot in inside(results.final(row.arm)[0]) if knot["step"] >= width]
            curves.plot(ties, curve[[tie - 1 for tie in ties]], marker, color=color, markersize=4)
        curves.set_xlabel("optimizer step")
        curves.xaxis.get_major_locator().set_params(integer=True)
        curves.set_ylabel(f"{results.plan.setting.unit}, minus those of {reference.label}")
        curves.set_title(f"Training loss, compared with {reference.label}: lower is better", loc="left", fontsize=10)
        curves.legend(frameon=False, fontsize=8.5)
        points(plane, found, results.plan.setting.unit)
        plane.set_title("Held-out loss against memory: lower and further left is better", loc="left", fontsize=10)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over a window of `width` steps that ends at each step; shorter at the start."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - width)
    return (total[end] - total[start]) / (end - start)


def _mean_losses(results: Results, arm: str) -> np.ndarray:
    return results.scale * np.mean([outcome["losses"] for outcome in results.final(arm)], axis=0)


def _look(arm: str) -> tuple[tuple[str, str, str], str]:
    """An arm's colour, line and marker, and its family's label."""
    family = family_of(arm)
    if family == FULL:
        return (style.GREY, "--", "X"), "full fine-tuning"
    name = FAMILIES[family].name
    return FAMILIES[family].look, f"chain: {name}" if FAMILIES[family].method(2).kind == "cola" else name
