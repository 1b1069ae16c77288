"""The demo's report: sentences on significance, checks, and the results as JSON."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from experiments import hardware
from experiments.report.stats import LEVEL
from experiments.study.arms import CEILING
from experiments.study.comparison import Results, Row
from experiments.tiny import corpus

SETTING = ("epochs", "train_bytes", "context", "batch_size", "warmup", "decay", "targets", "init")
"""The fields of the setting that the results record."""


@dataclass(frozen=True)
class Check:
    """A condition that must hold for the results to be worth reading."""

    what: str
    holds: bool
    found: str


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
        results: the outcomes.
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
    if rebuilt := [outcome["rebuilt"] for outcome in outcomes if outcome.get("rebuilt") is not None]:
        worst = max(rebuilt)
        found.append(Check("saved chains rebuild the tuned weights", worst <= 1e-6, f"largest difference {worst:.1e}"))
    if not learned:
        return found
    worse = [row.arm for row in rows if not row.test.mean < results.untouched]
    untouched = f"untouched {results.untouched:.4f}, worse: {worse or 'none'}"
    found.append(Check("every arm beats the untouched model", not worse, untouched))
    ceiling = next((row for row in rows if row.arm == CEILING), None)
    if ceiling is not None and ceiling.against is not None:
        gap = -ceiling.against.difference.mean
        what = "full fine-tuning beats LoRA, so there is a gap to close"
        found.append(Check(what, gap > 0, f"gap {gap:.4f} bits per byte"))
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
    """Everything as JSON values, losses in bits per byte; NaN becomes null.

    Args:
        results: the outcomes.
        rows: `rows(results)`.
        checks: `checks(results, rows)`.
        minutes: of the whole command.
        cpu_minutes: of one core, over all processes; unlike `minutes` they hardly depend on other work.
        command: as typed.
        workers: processes.
    """
    plan, text = results.plan, corpus.prose()
    return _jsonable(
        {
            "command": command,
            "commit": hardware.commit(),
            "hardware": hardware.describe_processor(),
            "minutes": minutes,
            "cpu_minutes": cpu_minutes,
            "processes": workers,
            "versions": {"python": platform.python_version(), **hardware.versions("torch", "transformers")},
            "prose": {
                "sha256": text.digest,
                "bytes": {split: len(body) for split, body in text.text.items()},
                "topics": text.topics,
            },
            "setting": {name: getattr(plan.setting, name) for name in SETTING},
            "methods": {name: asdict(arm.method) for name, arm in plan.arms.items()},
            "steps": plan.setting.steps(),
            "seeds": plan.seeds,
            "search_seeds": plan.search_seeds,
            "untouched": results.untouched,
            "level": LEVEL,
            "rows": [_row(row) for row in rows],
            "statements": statements(rows),
            "checks": [asdict(check) for check in checks],
            "runs": [
                {"arm": arm, "lr": run.lr, "seed": run.seed, **_run(outcome, results.scale)}
                for arm, run, outcome in results.runs()
            ],
        }
    )


def _row(row: Row) -> dict[str, Any]:
    names = ("arm", "label", "lr", "test", "against", "gap", "parameters", "seconds", "knots")
    shown = {name: getattr(row, name) for name in names}
    return {**shown, "test": asdict(row.test), "against": row.against and asdict(row.against)}


def _run(outcome: Mapping[str, Any], scale: float) -> dict[str, Any]:
    return {
        "validation": outcome["dev"] * scale,
        "losses": [loss * scale for loss in outcome["losses"]],
        **{name: outcome[name] for name in ("knots", "parameters", "seconds", "cpu_seconds")},
        "test": outcome["test"] * scale if "test" in outcome else None,
        "rebuilt": outcome.get("rebuilt"),
    }


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
