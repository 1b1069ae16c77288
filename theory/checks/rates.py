"""Checks of the rate at which the average gap falls with T.

The theorem's step depends on T, so each horizon needs a separate run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from theory.checks.check import FAIL, PASS, VACUOUS, Check, vacuous
from theory.checks.significance import LEVEL, student
from theory.frank_wolfe import Run


def fitted_slope(horizons: Sequence[int], averages: Sequence[float]) -> float:
    """The least-squares slope of log average against log T."""
    return float(np.polyfit(np.log(horizons), np.log(averages), 1)[0])


def rate_check(runs: Sequence[Run], tolerance: float = 0.03) -> Check:
    """``avg g`` falls as ``T^(-1/2 +- 0.03)`` over at least four separate runs."""
    if len(runs) < 4:
        return vacuous("slope -1/2", f"{len(runs)} horizons; a slope needs 4", bound=-0.5)
    slope = fitted_slope([run.T for run in runs], [run.average for run in runs])
    off = abs(slope + 0.5)
    margin = (tolerance - off) / tolerance
    return Check("slope -1/2", PASS if off <= tolerance else FAIL, margin, slope, -0.5, f"fitted slope {slope:.4f}")


def flatness_check(runs: Sequence[Run], factor: float = 1.3) -> list[Check]:
    """``avg/s`` and ``min/s`` stay within a factor over the horizons, for a family whose constants grow with T."""
    out = []
    for name, ratios in (
        ("avg/s flat", [run.average / run.scale for run in runs]),
        ("min/s flat", [run.smallest / run.scale for run in runs]),
    ):
        spread = max(ratios) / min(ratios) if min(ratios) > 0 else math.inf
        verdict = VACUOUS if len(runs) < 4 else PASS if spread <= factor else FAIL
        out.append(Check(name, verdict, (factor - spread) / factor, spread, factor, f"spread {spread:.3f}"))
    return out


def rates_check(slopes: Sequence[float], tolerance: float = 0.03, rate: float = -0.5) -> Check:
    """``avg g`` falls as ``T^(rate +- tolerance)`` in expectation, judged by the slopes of independent seeds."""
    mean, half = student(slopes)
    off = abs(mean - rate)
    verdict = FAIL if off - half > tolerance else PASS if off + half <= tolerance else VACUOUS
    detail = f"fitted slope {mean:.4f} +- {half:.2g} over {len(slopes)} seeds"
    margin = (tolerance + half - off) / tolerance if math.isfinite(half) else 0.0
    name = f"slope {Fraction(rate)}"
    return Check(name, verdict, margin, mean, rate, detail, LEVEL)


def stalled_check(slopes: Sequence[float], least: float = -0.125) -> Check:
    """``avg g`` does not fall with T: the slope lies above ``least`` in expectation, by independent seeds."""
    mean, half = student(slopes)
    verdict = FAIL if mean + half < least else PASS if mean - half >= least else VACUOUS
    detail = f"fitted slope {mean:.4f} +- {half:.2g} over {len(slopes)} seeds"
    margin = (mean + half - least) / abs(least) if math.isfinite(half) else 0.0
    return Check(f"slope above {Fraction(least)}", verdict, margin, mean, least, detail, LEVEL)
