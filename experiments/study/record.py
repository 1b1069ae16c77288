"""A comparison as JSON values: its command, setting and machine, and a row per arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from experiments import hardware
from experiments.study.comparison import Plan, Row


def record(plan: Plan, found: Sequence[Row], command: str) -> dict[str, Any]:
    """The results, with the command that ran them and where.

    Args:
        plan: what was wanted.
        found: the rows of arms that are complete, with losses in the setting's unit.
        command: as a user would type it.
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
