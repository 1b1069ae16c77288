"""The pictures of the suite: measured gaps, and the bounds over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from theory import theorem
from theory.checks.rates import fitted_slope
from theory.frank_wolfe import Run
from theory.step_sizes import TheoremStep
from theory.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, canvas, styled
from theory.suite.ladders import Rung
from theory.suite.tasks import Record

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


def pictures(records: Sequence[Record], out: Path) -> list[Path]:
    """Draw every picture for which the records have data.

    Args:
        records: of the suite, or of named runs. out: the folder of the PNG files.
    """
    paths = []
    rates = {r.label.removesuffix(" rate"): r.runs for r in records if r.kind == "rate" and r.runs}
    if rates:
        paths.append(average_gap(rates, out / "average_gap.png"))
    plain = [r for r in records if r.kind == "run" and _is_plain(r.runs[0])]
    by_instance: dict[tuple[str, int], list[Run]] = {}
    for r in plain:
        by_instance.setdefault((r.runs[0].problem.name, r.T), []).append(r.runs[0])
    several = {key: runs for key, runs in by_instance.items() if len(runs) > 1}
    longest = [runs for key, runs in several.items() if key[0].startswith("F:")] or list(several.values())
    if by_instance:
        runs = max(longest, key=len) if longest else list(by_instance.values())[-1]
        paths.append(along_a_run(runs, out / "gap_along_a_run.png"))
    ladders: dict[str, dict[str, list[Rung]]] = {"epsilon": {}, "rho": {}, "batch": {}}
    for r in records:
        if r.kind in ladders:
            ladders[r.kind].setdefault(r.label.split()[2] if r.kind != "batch" else "batch", []).extend(r.rungs)
    if ladders["epsilon"] or ladders["rho"]:
        paths.append(oracle_ladders(ladders["epsilon"], ladders["rho"], out / "epsilon_ladder.png"))
    if ladders["batch"]:
        paths.append(batch_ladder(ladders["batch"]["batch"], out / "batch_ladder.png"))
    # of several horizons, the largest
    last = {
        r.label: r.runs[0]
        for r in plain
        if not r.label.startswith(("|L|", "one step")) and isinstance(r.runs[0].step, TheoremStep)
    }
    rows = [(label, r.average / r.scale, r.smallest / r.scale, _sharp(r) / r.scale) for label, r in last.items()]
    if rows:
        rows.sort(key=lambda row: -row[1])
        paths.append(tightness(rows[:40], out / "tightness.png"))
    return paths


def _is_plain(run: Run) -> bool:
    """Whether the run used the problem's own oracle and the exact gradient."""
    return run.oracle is run.problem.oracle and not run.estimator.noisy


def _sharp(run: Run) -> float:
    """The sharp bound for the theorem's step, from the measured drop."""
    return theorem.sharp_bound(run.drop, run.problem.beta, run.oracle.circumradius, run.T, float(run.eta[0]))


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
        sharp = [_sharp(run) for run in runs]
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
    figure.savefig(path)
    return path


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
    figure.savefig(path)
    return path


def _whiskers(ax: Any, rungs: Sequence[Rung], colour: str, marker: str, label: str, key: str | None = None) -> None:
    """One curve of a ladder with its intervals: the average gap, or one of the rungs' extra quantities."""
    shown = [rung.average if key is None else rung.extra[key] for rung in rungs]
    ax.errorbar(
        [rung.setting for rung in rungs],
        [interval.mean for interval in shown],
        yerr=[interval.half for interval in shown],
        fmt=marker + "-",
        color=colour,
        label=label,
        capsize=2.5,
        linewidth=1,
    )


@styled
def oracle_ladders(epsilon: dict[str, Sequence[Rung]], rho: dict[str, Sequence[Rung]], path: Path) -> Path:
    """Average gap against the oracle's error, additive on the left and multiplicative on the right."""
    figure, (left, right) = canvas(1, 2, 8.2, 3.3)
    for (adversary, rungs), colour, marker in zip(epsilon.items(), (BLUE, RED), "os"):
        _whiskers(left, rungs, colour, marker, f"average gap, adversary “{adversary}”")
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
        _whiskers(right, rungs, colour, marker, f"average gap, adversary “{adversary}”")
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
    figure.savefig(path)
    return path


@styled
def batch_ladder(rungs: Sequence[Rung], path: Path) -> Path:
    """True, reported and two-batch gap against the batch size; the reported gap is biased upward."""
    figure, (ax,) = canvas(1, 1, 5.2, 3.5)
    b = [rung.setting for rung in rungs]
    ax.plot(b, [rung.extra["bound"].mean for rung in rungs], "--", color=BLACK, label=r"bound $1.5s$ + noise term")
    _whiskers(ax, rungs, RED, "s", "gap of the minibatch gradient (biased)", "reported")
    _whiskers(ax, rungs, GREEN, "D", r"two-batch estimate of $g-\varepsilon$", "two batches")
    _whiskers(ax, rungs, BLUE, "o", "true gap")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("batch size b")
    ax.set_ylabel("average over the run")
    run = rungs[0].runs[0]
    ax.set_title(f"{run.problem.name}, T = {run.T}", loc="left")
    ax.legend(loc="best")
    figure.savefig(path)
    return path


@styled
def tightness(rows: Sequence[tuple[str, float, float, float]], path: Path) -> Path:
    """``avg/s`` per instance and step, with its sharp bound and the constants.

    Args:
        rows: (label, avg/s, min/s, sharp bound over s); infinite bounds are left out.
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
    figure.savefig(path)
    return path
