"""A comparison as JSON values: what was run, on what, and a row per arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from experiments import hardware
from experiments.study.comparison import Plan, Row


def record(plan: Plan, found: Sequence[Row], command: str) -> dict[str, Any]:
    """The results with all that is needed to repeat them.

    Args:
        plan: what was wanted.
        found: the rows of arms that are complete, with losses in the setting's unit.
        command: that ran it.
    """
    return {
        "command": command,
        **hardware.provenance(),
        "setting": asdict(plan.setting),
        "steps": plan.setting.steps(),
        "unit": plan.setting.unit,
        "seeds": plan.seeds,
        "search_seeds": plan.search_seeds,
        "rows": [asdict(row) for row in found],
    }
