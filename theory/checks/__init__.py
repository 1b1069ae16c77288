"""What must hold of a run: `audit` makes every check that applies, and each check can fail."""

from theory.checks.bounds import audit, failures
from theory.checks.record import FAIL, PASS, VACUOUS, Check

__all__ = ["FAIL", "PASS", "VACUOUS", "Check", "audit", "failures"]
