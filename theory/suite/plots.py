"""The pictures of the theory test-bed: what the theorem promises, drawn over what was measured.

Colours are Okabe and Ito's, told apart by people with any kind of colour vision, and every curve also has
its own marker or dash. Figures are drawn without pyplot, so that no global state or window is touched;
matplotlib is imported when a picture is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from theory import theorem
from theory.frank_wolfe import Run
from theory.suite.ladders import Rung, fitted_slope

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
PALETTE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = "osD^vPX"
DASHES = ("-", "-", "-", "-", (0, (4, 2)), "-", "-")
STEP_LABELS = {
    "theorem": r"theorem's $\eta$",
    "sqrt2": r"$\sqrt{2}\,\eta$",
    "sqrt8": r"$\sqrt{8}\,\eta$",
    "short": "short step",
    "2/(t+2)": "$2/(t+2)$",
    "1/sqrt(t+1)": r"$1/\sqrt{t+1}$",
}
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
    """A figure with a flat list of axes, in the style of this package."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.ravel())


def save(figure: Any, path: Path) -> Path:
    """Write the figure in the package's style."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure.savefig(path)
    return path


def styled(draw: Any) -> Any:
    """Legends and ticks read the style when they are made, so the whole drawing runs under it."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    wrapped.__doc__, wrapped.__name__ = draw.__doc__, draw.__name__
    return wrapped


@styled
def average_gap(rates: dict[str, Sequence[Run]], path: Path) -> Path:
    """Average gap against T over separate runs, one panel per instance, with the bounds and the fitted slope."""
    columns = min(3, len(rates))
    rows = math.ceil(len(rates) / columns)
    figure, axes = canvas(rows, columns, 2.75 * columns, 2.5 * rows + 0.3)
    for ax in axes[len(rates) :]:
        ax.set_visible(False)
    for i, (ax, (name, runs)) in enumerate(zip(axes, rates.items())):
        T = np.array([run.T for run in runs], dtype=float)
        s = np.array([run.scale for run in runs])
        average = np.array([run.average for run in runs])
        smallest = np.array([run.smallest for run in runs])
        sharp = [
            theorem.sharp_bound(run.drop, run.problem.beta, run.oracle.circumradius, run.T, float(run.eta[0]))
            for run in runs
        ]
        ax.loglog(T, 2 * s, ":", color=BLACK, label="paper, $2s$")
        ax.loglog(T, 1.5 * s, "--", color=ORANGE, label="proved, $1.5s$")
        ax.loglog(T, sharp, "-", color=SKY, label="sharp, measured drop")
        ax.loglog(T, average, "o", color=BLUE, label=r"average $g_t$")
        ax.loglog(T, smallest, "v", color=RED, label=r"smallest $g_t$", markersize=3.5)
        if len(T) > 1:
            slope = fitted_slope([run.T for run in runs], list(average))
            note = f"fitted slope {slope:.3f}".replace("-", "\N{MINUS SIGN}")
        else:
            note = "one horizon"
        if name == "G":
            ratio = average / s
            note = f"avg/s from {ratio.min():.3f} to {ratio.max():.3f}"
        ax.set_title(f"{name}  ", loc="left", fontweight="bold")
        ax.set_title(note, loc="right", fontsize=8)
        ax.minorticks_off()
        ax.set_xticks(T, [f"{t:g}" for t in T])
        if i >= len(rates) - columns:
            ax.set_xlabel("number of steps T")
        if i % columns == 0:
            ax.set_ylabel("Frank-Wolfe gap")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, handlelength=1.8, columnspacing=1.2)
    return save(figure, path)


@styled
def along_a_run(runs: Sequence[Run], path: Path) -> Path:
    """The gap of each step and its running average, for several step rules on one instance."""
    figure, (left, right) = canvas(1, 2, 8.2, 3.5)
    for i, run in enumerate(runs):
        t = np.arange(1, run.T + 1)
        keep = np.unique(np.geomspace(1, run.T, 150).astype(int)) - 1
        options = {
            "color": PALETTE[i % len(PALETTE)],
            "linestyle": DASHES[i % len(DASHES)],
            "linewidth": 2.4 if run.step.name == "short" else 1.3,  # backtracking often lies on top of it
            "marker": MARKERS[i % len(MARKERS)],
            "markevery": (i / 60, 0.2),
            "label": STEP_LABELS.get(run.step.name, run.step.name),
        }
        left.loglog(t[keep], np.maximum(run.gap, np.finfo(float).tiny)[keep], **options)
        right.loglog(t[keep], (np.cumsum(run.gap) / t)[keep], **options)
    first = runs[0]
    bound = right.axhline(1.5 * first.scale, color=BLACK, linestyle=":", linewidth=1.3)
    left.set_title(f"{first.problem.name}, T = {first.T}: gap of step t", loc="left")
    right.set_title("average gap up to step t", loc="left")
    for ax in (left, right):
        ax.set_xlabel("step t")
        ax.minorticks_off()
    left.set_ylabel("Frank-Wolfe gap")
    left.legend(loc="lower left", handlelength=2.4)
    right.legend([bound], [r"$1.5s$, proved at t = T for the theorem's $\eta$"], loc="lower left")
    return save(figure, path)


def _whiskers(ax: Any, x: Sequence[float], rungs: Sequence[Rung], colour: str, marker: str, label: str) -> None:
    mean = [rung.average.mean for rung in rungs]
    half = [rung.average.half for rung in rungs]
    ax.errorbar(x, mean, yerr=half, fmt=marker + "-", color=colour, label=label, capsize=2.5, linewidth=1)


@styled
def oracle_ladders(epsilon: dict[str, Sequence[Rung]], rho: dict[str, Sequence[Rung]], path: Path) -> Path:
    """Average gap against the oracle's error: additive on the left, multiplicative on the right, with both bounds."""
    figure, (left, right) = canvas(1, 2, 8.2, 3.3)
    for (adversary, rungs), colour, marker in zip(epsilon.items(), (BLUE, RED), "os"):
        _whiskers(
            left,
            [rung.setting for rung in rungs],
            rungs,
            colour,
            marker,
            f"average gap, adversary “{adversary}”",
        )
    if epsilon:
        rungs = next(iter(epsilon.values()))
        x = np.array([rung.setting for rung in rungs])
        s = float(np.mean([run.scale for run in rungs[0].runs]))
        left.plot(x, 1.5 * s + x, "--", color=BLACK, label=r"bound $1.5s+\varepsilon$")
        left.axhline(1.5 * s, linestyle=":", color=BLACK, label=r"$1.5s$, with $\varepsilon$ left out")
        left.legend(loc="upper left")
    left.set_xlabel(r"additive oracle error $\varepsilon$")
    left.set_ylabel("average Frank-Wolfe gap")
    for (adversary, rungs), colour, marker in zip(rho.items(), (BLUE, RED), "os"):
        _whiskers(
            right,
            [rung.setting for rung in rungs],
            rungs,
            colour,
            marker,
            f"average gap, adversary “{adversary}”",
        )
    if rho:
        rungs = next(iter(rho.values()))
        x = np.linspace(min(r.setting for r in rungs), 1, 100)
        s = float(np.mean([run.scale for run in rungs[0].runs]))
        right.plot(x, 1.5 * s / x, "--", color=BLACK, label=r"bound $1.5s/\rho$")
        right.axhline(1.5 * s, linestyle=":", color=BLACK, label=r"$1.5s$, with $\rho$ left out")
        right.legend(loc="upper right")
    right.set_xlabel(r"fraction $\rho$ of the gap that the oracle keeps")
    for ax in (left, right):
        ax.set_ylim(bottom=0)
    return save(figure, path)


@styled
def batch_ladder(rungs: Sequence[Rung], path: Path) -> Path:
    """True, reported and two-batch gap against the batch size: the reported one is biased upward."""
    figure, (ax,) = canvas(1, 1, 5.2, 3.5)
    b = [rung.setting for rung in rungs]
    ax.plot(b, [rung.extra["bound"].mean for rung in rungs], "--", color=BLACK, label=r"bound $1.5s$ + noise term")
    for key, colour, marker, label in (
        ("reported", RED, "s", "gap of the minibatch gradient (biased)"),
        ("two batches", GREEN, "D", r"two-batch estimate of $g-\varepsilon$"),
    ):
        ax.errorbar(
            b,
            [r.extra[key].mean for r in rungs],
            yerr=[r.extra[key].half for r in rungs],
            fmt=marker + "-",
            color=colour,
            label=label,
            capsize=2.5,
            linewidth=1,
        )
    _whiskers(ax, b, rungs, BLUE, "o", "true gap")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("batch size b")
    ax.set_ylabel("average over the run")
    run = rungs[0].runs[0]
    ax.set_title(f"{run.problem.name}, T = {run.T}", loc="left")
    ax.legend(loc="best")
    return save(figure, path)


@styled
def tightness(rows: Sequence[tuple[str, float, float, float]], path: Path) -> Path:
    """How much of each bound is used: ``avg/s`` per instance and step against its own sharp bound and the
    constants.

    Args:
        rows: (label, avg/s, min/s, sharp bound over s); a bound that is not finite is left out.
    """
    figure, (ax,) = canvas(1, 1, 6.4, 1.3 + 0.19 * len(rows))
    y = np.arange(len(rows))[::-1]
    ax.barh(y, [row[1] for row in rows], height=0.62, color=SKY, label="average gap / s")
    ax.plot(
        [row[2] for row in rows],
        y,
        "v",
        color=RED,
        markersize=3.5,
        label="smallest gap / s",
        linestyle="none",
    )
    finite = [(row[3], i) for row, i in zip(rows, y) if math.isfinite(row[3])]
    ax.plot(
        [v for v, _ in finite],
        [i for _, i in finite],
        "|",
        color=BLUE,
        markersize=10,
        markeredgewidth=2,
        label="sharp bound / s",
        linestyle="none",
    )
    for value, style, label in ((1.5, "--", "proved, 1.5"), (2.0, ":", "paper, 2")):
        ax.axvline(value, color=BLACK, linestyle=style, linewidth=1, label=label)
    ax.set_yticks(y, [row[0] for row in rows])
    ax.set_xlim(-0.03, 2.15)
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.grid(False, axis="y")
    ax.set_xlabel("in units of $s = \\sqrt{M\\beta}\\,D/\\sqrt{T}$")
    figure.legend(
        *ax.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=5,
        columnspacing=1,
        handlelength=1.5,
    )
    return save(figure, path)
