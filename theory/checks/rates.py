"""Checks of the rate at which the average gap falls with T.

The theorem's step depends on T, so each horizon needs a separate run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from theory.checks.check import FAIL, PASS, VACUOUS, Check, vacuous
from theory.checks.significance import LEVEL, at_most_hits
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


def rates_check(slopes: Sequence[float], tolerance: float = 0.03, share: float = 0.9) -> Check:
    """At least nine in ten seeds have a slope of ``-1/2 +- 0.03``; the number outside is binomial.

    VACUOUS with so few seeds that even all of them outside could be chance.
    """
    n, outside = len(slopes), sum(abs(slope + 0.5) > tolerance for slope in slopes)
    limit = at_most_hits(n, 1 - share)
    off = max(abs(slope + 0.5) for slope in slopes)
    verdict = VACUOUS if limit >= n else FAIL if outside > limit else PASS
    detail = f"slopes {min(slopes):.4f} to {max(slopes):.4f} over {n} seeds, {outside} outside, {limit} allowed"
    margin = (limit - outside) / n - (0.5 / n if outside > limit else 0.0)
    return Check("slope -1/2", verdict, margin if verdict != VACUOUS else 0.0, off, tolerance, detail, LEVEL)
