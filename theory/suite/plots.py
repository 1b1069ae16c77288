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
from theory.problems.instances import INSTANCES
from theory.step_sizes import TheoremStep
from theory.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, canvas, styled
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
    if plain:
        paths.append(along_a_run(_comparable([r.runs[0] for r in plain]), out / "gap_along_a_run.png"))
    ladders: dict[str, dict[str, list[Rung]]] = {"epsilon": {}, "rho": {}, "batch": {}}
    for r in records:
        if r.kind in ladders:
            ladders[r.kind].setdefault(r.label.split()[2] if r.kind != "batch" else "batch", []).extend(r.rungs)
    if ladders["epsilon"] or ladders["rho"]:
        paths.append(oracle_ladders(ladders["epsilon"], ladders["rho"], out / "epsilon_ladder.png"))
    if ladders["batch"]:
        paths.append(batch_ladder(ladders["batch"]["batch"], out / "batch_ladder.png"))
    # of several horizons, the largest
    last = {r.label: r for r in plain if r.label in INSTANCES and r.runs[0].step == TheoremStep()}
    told = {label: r for label, r in last.items() if not label.startswith("quadratic-")} or last
    if told:
        paths.append(tightness([(label, r.runs[0]) for label, r in told.items()], out / "tightness.png"))
    return paths


def _comparable(runs: Sequence[Run]) -> list[Run]:
    """The runs of one problem that show most: the most step rules, on F if possible; else the most horizons."""
    by_problem: dict[str, list[Run]] = {}
    for run in runs:
        by_problem.setdefault(run.problem.name, []).append(run)

    def worth(group: list[Run]) -> tuple[int, bool, int]:
        rules = max(len({run.step.name for run in group if run.T == T}) for T in {run.T for run in group})
        return rules, group[0].problem.name.startswith("F:"), len(group)

    return max(by_problem.values(), key=worth)


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
    """The gap of each step, and its average: against T where one rule ran for several T, else along the run.

    Args:
        runs: of one problem, with several step rules for one T, or with one rule for several T.
        path: of the PNG file.
    """
    horizons = sorted({run.T for run in runs})
    rules = {T: [run for run in runs if run.T == T] for T in horizons}
    T = max(horizons, key=lambda T: (len(rules[T]), T))
    figure, (left, right) = canvas(1, 2, 9.4, 3.9)
    along = len(rules[T]) > 1
    shown = rules[T] if along else [rules[T][0] for T in horizons]
    for i, run in enumerate(shown):
        t = np.arange(1, run.T + 1)
        keep = np.unique(np.geomspace(1, run.T, 150).astype(int)) - 1
        options: dict[str, Any] = {
            "color": PALETTE[i % len(PALETTE)],
            "linestyle": DASHES[i % len(DASHES)],
            "linewidth": 2.4 if run.step.name == "short" else 1.3,  # backtracking often lies on top of it
            "marker": MARKERS[i % len(MARKERS)],
            "markevery": (i / 60, 0.2),
            "label": STEP_LABELS.get(run.step.name, run.step.name) if along else f"T = {run.T:,}",
        }
        left.loglog(t[keep], np.maximum(run.gap, np.finfo(float).tiny)[keep], **options)
        if along:
            right.loglog(t[keep], (np.cumsum(run.gap) / t)[keep], **options)
        else:
            right.loglog([run.T], [run.average], **{**options, "markersize": 7, "markevery": 1})
    name = shown[0].problem.name
    if along:
        bound = right.axhline(1.5 * shown[0].scale, color=BLACK, linestyle=":", linewidth=1.3)
        right.set_title("average gap of the steps so far", loc="left")
        right.set_xlabel("step t")
        right.legend([bound], ["proved for the theorem's η: at most this at the last step"], loc="lower left")
    else:
        right.loglog(horizons, [run.average for run in shown], "-", color=GREY, zorder=0, label="average gap of a run")
        right.loglog(horizons, [1.5 * run.scale for run in shown], ":", color=BLACK, label="proved bound, $1.5s$")
        right.set_title("average gap of a whole run, against its length", loc="left")
        right.set_xlabel("steps of the run, T")
        right.set_xticks(horizons, [f"{T:,}" for T in horizons])
        right.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        right.yaxis.set_major_formatter("{x:g}")
        lines = right.get_lines()[-2:]
        right.legend(lines, [line.get_label() for line in lines], loc="lower left")
    left.set_title(f"{name}: gap at each step" + (f", T = {T:,}" if along else ""), loc="left")
    left.set_xlabel("step t")
    left.set_ylabel("Frank-Wolfe gap")
    for ax in (left, right):
        ax.minorticks_off()
    if len(shown) > 1:
        title = "step rule" if along else "length of the run"
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", handlelength=2.4, title=title)
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
    """The gap with its estimate from the training batch, and the progress g − ε with its two-batch estimate."""
    figure, (left, right) = canvas(1, 2, 9.4, 3.7)
    b = [rung.setting for rung in rungs]
    left.plot(b, [rung.extra["bound"].mean for rung in rungs], "--", color=BLACK, label="proved bound, $1.5s$ + noise")
    _whiskers(left, rungs, RED, "s", "as the batch that chose the vertex shows it", "reported")
    _whiskers(left, rungs, BLUE, "o", "true gap")
    left.set_title("gap g: its own batch exaggerates it", loc="left")
    left.set_ylabel("average over the run")
    left.set_yscale("log")
    _whiskers(right, rungs, GREEN, "D", "as a second, independent batch shows it", "two batches")
    _whiskers(right, rungs, BLUE, "o", "true value", "gap minus error")
    right.set_title("gap minus oracle error: a second batch is unbiased", loc="left")
    right.set_ylim(bottom=0)
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(b, [f"{size:g}" for size in b])
        ax.minorticks_off()
        ax.set_xlabel("batch size")
        ax.legend(loc="best")
    run = rungs[0].runs[0]
    figure.suptitle(f"{run.problem.name}, T = {run.T:,}: noisy gradients (bars: 99.9 % intervals)", x=0.01, ha="left")
    figure.savefig(path)
    return path


@styled
def tightness(runs: Sequence[tuple[str, Run]], path: Path) -> Path:
    """The share of the proved bound that each instance uses, the tightest first.

    Args:
        runs: label and run, all with the theorem's step; the label is a key of `INSTANCES`.
        path: of the PNG file.
    """
    rows = sorted(
        ((label, run.average / (1.5 * run.scale), _sharp(run) / (1.5 * run.scale)) for label, run in runs),
        key=lambda row: row[1],
    )
    figure, (ax,) = canvas(1, 1, 7.6, 1.1 + 0.3 * len(rows))
    y = np.arange(len(rows))
    ax.barh(y, [100 * used for _, used, _ in rows], height=0.6, color=SKY, label="average gap")
    for (_, used, _), i in zip(rows, y):
        inside = used > 0.08
        ax.text(100 * used + (-1 if inside else 1), i, f"{100 * used:.0f} %", va="center",
                ha="right" if inside else "left", fontsize=7.5)  # fmt: skip
    finite = [(100 * sharp, i) for i, (_, _, sharp) in enumerate(rows) if math.isfinite(sharp)]
    ax.plot(
        [sharp for sharp, _ in finite],
        [i for _, i in finite],
        "|",
        color=BLUE,
        markersize=11,
        markeredgewidth=2,
        label="bound that knows the run's own loss drop",
    )
    ax.axvline(100, color=BLACK, linestyle="--", linewidth=1, label="proved bound, $1.5s$")
    ax.set_yticks(y, [f"{INSTANCES[label].about.split(',')[0].split(';')[0]}  ({label})" for label, _, _ in rows])
    ax.set_xlim(0, 112)
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.grid(False, axis="y")
    ax.set_xlabel("% of the proved bound")
    figure.suptitle("Share of the proved bound that the average gap uses", x=0.01, ha="left")
    figure.legend(
        *ax.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        columnspacing=1.2,
    )
    figure.savefig(path)
    return path
