"""What a comparison says: the table, the sentences on significance, the checks, the results as JSON."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

from experiments.hardware import commit, describe_processor
from experiments.report.formats import Grid, Text, aligned
from experiments.report.stats import Interval, Paired, gap_closed, paired, t_interval
from experiments.study.arms import CEILING, REFERENCE
from experiments.study.comparison import Results
from experiments.study.demo_cells import prose
from experiments.sweep.sweep import Outcome

LEVEL = 0.05
"""The level of significance of all statements, after Holm's correction."""


@dataclass(frozen=True)
class Row:
    """One arm's line of the table.

    Attributes:
        arm: its name.
        label: as shown.
        lr: the chosen peak learning rate.
        test: held-out bits per byte, mean and 95 % t interval over seeds.
        against: the paired difference from the reference; None for the reference, or without one.
        gap: the share closed of the gap from LoRA to full fine-tuning; NaN where there is none.
        parameters: trainable at once, at most.
        seconds: of one core for one run, training only, mean over seeds.
        knots: mean number of knots inside the run.
    """

    arm: str
    label: str
    lr: float
    test: Interval
    against: Paired | None
    gap: float
    parameters: int
    seconds: float
    knots: float


@dataclass(frozen=True)
class Check:
    """Something that must hold for the results to be worth reading."""

    what: str
    holds: bool
    found: str


def rows(results: Results) -> list[Row]:
    """The table, one row per arm in the plan's order."""
    arms = results.plan.arms
    losses = {arm: results.losses(arm) for arm in arms}
    means = {arm: math.fsum(values) / len(values) for arm, values in losses.items()}
    against = paired(losses, REFERENCE) if REFERENCE in losses else {}
    gap = REFERENCE in means and CEILING in means
    table = []
    for arm in arms:
        final = results.final(arm)
        table.append(
            Row(
                arm=arm,
                label=arms[arm].label,
                lr=results.chosen(arm)[0].lr,
                test=t_interval(losses[arm]),
                against=against.get(arm),
                gap=gap_closed(means[arm], means[REFERENCE], means[CEILING]) if gap else math.nan,
                parameters=final[0]["parameters"],
                seconds=math.fsum(outcome["cpu_seconds"] for outcome in final) / len(final),
                knots=math.fsum(len(inside(outcome)) for outcome in final) / len(final),
            )
        )
    return table


def inside(outcome: Outcome) -> list[dict[str, Any]]:
    """The knots of a run without the last tie, which ends it."""
    return [knot for knot in outcome["knots"] if knot["step"] < len(outcome["losses"])]


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    header = (
        "arm", "lr", "knots", "held-out bits/byte", "minus LoRA (95 %)", "p (Holm)", "gap closed", "trainable",
        "seconds",
    )  # fmt: skip
    lines = [
        (
            row.label,
            f"{row.lr:g}",
            f"{row.knots:.3g}",
            _mean(row.test),
            _difference(row.against),
            _number(row.against.p_holm if row.against else math.nan, ".2g"),
            _number(100 * row.gap, ".0f", " %"),
            f"{row.parameters:,}",
            f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    return aligned(Grid(header, tuple(tuple(map(Text, line)) for line in lines)))


def statements(rows: list[Row]) -> list[str]:
    """One sentence per comparison with LoRA."""
    said = []
    for row in rows:
        if row.against is None:
            continue
        label, difference = row.label, row.against.difference.mean
        size = f"{abs(difference):.4f} bits per byte {'below' if difference < 0 else 'above'} LoRA"
        if math.isnan(row.against.p):
            said.append(f"{label}: {size}; one seed, no test possible")
        elif row.against.significant(LEVEL):
            said.append(f"{label}: {size}, significant (p = {row.against.p_holm:.2g})")
        else:
            said.append(f"{label}: {size}, not significant (p = {row.against.p_holm:.2g})")
    return said


def checks(results: Results, rows: list[Row], learned: bool = True) -> list[Check]:
    """Whether the comparison can be trusted.

    Args:
        results: what came out.
        rows: `rows(results)`.
        learned: also require that fine-tuning helped and that there is a gap to close; False for runs too short for
            either.
    """
    found = []
    outcomes = [outcome for _, _, outcome in results.runs()]
    losses = [loss for outcome in outcomes for loss in outcome["losses"]]
    found.append(Check("every loss is finite", all(map(math.isfinite, losses)), f"{len(losses)} steps"))
    steps = results.plan.setting.steps()
    short = [outcome for outcome in outcomes if len(outcome["losses"]) != steps]
    found.append(Check("every run took the same steps", not short, f"{steps} steps, {len(short)} runs differ"))
    if rebuilt := [outcome["rebuilt"] for outcome in outcomes if outcome["rebuilt"] is not None]:
        worst = max(rebuilt)
        found.append(Check("saved chains rebuild the tuned weights", worst <= 1e-6, f"largest difference {worst:.1e}"))
    if not learned:
        return found
    worse = [row.arm for row in rows if not row.test.mean < results.untouched]
    found.append(
        Check(
            "every arm beats the untouched model",
            not worse,
            f"untouched {results.untouched:.4f}, worse: {worse or 'none'}",
        )
    )
    ceiling = next((row for row in rows if row.arm == CEILING), None)
    if ceiling is not None and ceiling.against is not None:
        gap = -ceiling.against.difference.mean
        found.append(
            Check(
                "full fine-tuning beats LoRA, so there is a gap to close",
                gap > 0,
                f"gap {gap:.4f} bits per byte",
            )
        )
    return found


def record(
    results: Results,
    rows: list[Row],
    checks: list[Check],
    minutes: float,
    cpu_minutes: float,
    command: str,
    workers: int,
) -> dict[str, Any]:
    """Everything as JSON values; NaN becomes null.

    Args:
        results: what came out.
        rows: `rows(results)`.
        checks: `checks(results, rows)`.
        minutes: the command took.
        cpu_minutes: of one core, over all processes; unlike `minutes` they hardly depend on what else runs.
        command: as typed.
        workers: processes.
    """
    plan, text = results.plan, prose()
    return _jsonable(
        {
            "command": command,
            "commit": commit(),
            "hardware": describe_processor(),
            "minutes": minutes,
            "cpu_minutes": cpu_minutes,
            "processes": workers,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "prose": {
                "sha256": text.digest,
                "bytes": {split: len(body) for split, body in text.text.items()},
                "topics": text.topics,
            },
            "setting": {name: value for name, value in asdict(plan.setting).items() if name != "model"},
            "methods": {name: asdict(arm.method) for name, arm in plan.arms.items()},
            "steps": plan.setting.steps(),
            "seeds": plan.seeds,
            "search_seeds": plan.search_seeds,
            "untouched": results.untouched,
            "level": LEVEL,
            "rows": [asdict(row) for row in rows],
            "statements": statements(rows),
            "checks": [asdict(check) for check in checks],
            "runs": [{"arm": arm, "lr": run.lr, "seed": run.seed, **outcome} for arm, run, outcome in results.runs()],
        }
    )


def _mean(interval: Interval) -> str:
    spread = "" if math.isnan(interval.low) else f" ± {interval.half_width:.4f}"
    return f"{interval.mean:.4f}{spread}"


def _difference(against: Paired | None) -> str:
    if against is None:
        return "–"
    limits = against.difference
    if math.isnan(limits.low):
        return f"{limits.mean:+.4f}"
    return f"{limits.mean:+.4f} [{limits.low:+.4f}, {limits.high:+.4f}]"


def _number(value: float, form: str, unit: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:{form}}{unit}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value
