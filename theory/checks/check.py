"""One check: a statement, its verdict, and the margin by which it holds or fails.

A verdict is PASS, FAIL or VACUOUS. VACUOUS means that the statement holds but says nothing: the bound lies
above every gap of the run, the quantity cannot be recomputed at this size, or the draws do not decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from theory.checks.significance import LEVEL

PASS, FAIL, VACUOUS = "PASS", "FAIL", "VACUOUS"


@dataclass(frozen=True)
class Check:
    """One statement about one run, or about a group of runs.

    Attributes:
        name: the statement. verdict: PASS, FAIL or VACUOUS.
        margin: slack left, ``(bound - measured) / max(|bound|, |measured|)``; negative if the check fails.
        measured, bound: the two sides. detail: a note for the reader.
        level: the probability of a false alarm; 0 where nothing is drawn.
    """

    name: str
    verdict: str
    margin: float
    measured: float
    bound: float
    detail: str = ""
    level: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The check for JSON lines; numbers that are not finite become None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def failures(checks: Iterable[Check]) -> list[Check]:
    """The checks that FAIL."""
    return [check for check in checks if check.verdict == FAIL]


def vacuous(name: str, why: str, *, measured: float = math.nan, bound: float = 0.0) -> Check:
    """A check that says nothing about this run."""
    return Check(name, VACUOUS, 0.0, measured, bound, why)


def at_most(
    name: str,
    measured: float,
    bound: float,
    tolerance: float = 0.0,
    *,
    vacuous: bool = False,
    detail: str = "",
    level: float = 0.0,
) -> Check:
    """The statement ``measured <= bound + tolerance``; NaN fails."""
    size = max(abs(bound), abs(measured), tolerance, np.finfo(float).tiny)
    margin = (bound + tolerance - measured) / size
    verdict = (VACUOUS if vacuous else PASS) if measured <= bound + tolerance else FAIL
    return Check(name, verdict, float(margin), float(measured), float(bound), detail, level)


def expected_at_most(name: str, mean: float, bound: float, allowance: float, *, largest: float = math.inf) -> Check:
    """The statement ``E x <= bound``; VACUOUS where the mean does not decide, or no value can exceed the bound.

    Args:
        name: the statement. mean: the measured mean. bound: the right side.
        allowance: how far the mean may be from its expectation at the level of `theory.checks.significance`.
        largest: the largest value that could enter the mean; a bound above it says nothing.
    """
    size = max(abs(bound), abs(mean), np.finfo(float).tiny)
    if mean > bound + allowance:
        verdict = FAIL
    else:
        verdict = PASS if mean + allowance <= bound < largest else VACUOUS
    note = f"{mean:.4g} +- {allowance:.2g}"
    return Check(name, verdict, (bound + allowance - mean) / size, mean, bound, note, LEVEL)
