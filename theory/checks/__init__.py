"""Checks of a run: `audit` makes every check that applies, and each of them can fail.

A new statement about any run goes to `theory.checks.record`, the definition of a step rule to
`theory.checks.steps`, that of an estimator to `theory.checks.estimators`, a new bound to `theory.checks.bounds`, and a
statement about estimated gradients or about groups of runs to `theory.checks.noise` or `theory.checks.rates`.
Statements about random draws are judged at the level of `theory.checks.significance`.
"""

from theory.checks.bounds import bounds_on
from theory.checks.check import FAIL, PASS, VACUOUS, Check, failures
from theory.checks.record import CHECKS
from theory.checks.steps import step_size
from theory.frank_wolfe import Run

__all__ = ["FAIL", "PASS", "VACUOUS", "Check", "audit", "failures"]


def audit(run: Run) -> list[Check]:
    """Every check that applies to a run.

    Returns:
        The checks, those of the theorem last. A run is sound if none of them FAILs.
    """
    return [*(check(run) for check in CHECKS.values()), step_size(run), *bounds_on(run)]
