"""The theorem's statements about one run, and the audit that puts all checks together.

`theory.checks` judges the record step by step; here stand the constants: the two-sided law, 2 s, 1.5 s,
the sharp bound, and what takes their place for other steps.
"""

from __future__ import annotations

import math

import numpy as np

from theory import theorem
from theory.checks.record import ALWAYS, FAIL, VACUOUS, Check, at_most, pairing_rounding, step_size, value_rounding
from theory.frank_wolfe import Run
from theory.step_sizes import ShortStep, TheoremStep


def two_sided(run: Run) -> Check:
    """``avg (g - eps)`` lies in ``drop/(eta T) -+ eta beta D^2/2``; at the theorem's step ``s (drop/M -+ 1/2)``."""
    p, eta = run.problem, _constant_step(run)
    low, high = theorem.two_sided(run.drop, p.M, p.beta, run.oracle.diameter, run.T, eta)
    seen = float((run.gap - run.error).mean())
    tolerance = pairing_rounding(run) + 2 * value_rounding(run) / (eta * run.T)
    kind = "attained: lower end above 0" if low > 0 else "upper side only: lower end below 0"
    centre, half = (low + high) / 2, (high - low) / 2
    return at_most(
        "two-sided law",
        abs(seen - centre),
        half,
        tolerance,
        vacuous=low <= 0 and _silent(run, high),
        detail=f"[{low:.4g}, {high:.4g}] {kind}",
    )


def _constant_step(run: Run) -> float:
    """The constant step that the rule promises, from the constants and not from the record."""
    assert isinstance(run.step, TheoremStep)
    p = run.problem
    return theorem.theorem_step(p.M, p.beta, run.oracle.diameter, run.T, run.step.factor)


def _error_term(run: Run) -> float:
    """The ``eps`` of the bound: what the oracle admits to, or the measured mean where the gradient is estimated."""
    if run.estimator.noisy or not run.oracle.exact:
        return float((run.error + run.gap_upper - run.gap).mean())
    return run.oracle.epsilon


def _silent(run: Run, bound: float) -> bool:
    """Whether a bound says nothing: no gap of the run exceeds it.

    Where the gap falls from its first value that means ``bound >= g_1``. Instance A starts next to a maximum, with
    a gap of almost zero that then rises above the bound, and is judged by the gaps that it meets.
    """
    return bound >= float(run.gap.max())


def _bounded(name: str, run: Run, bound: float, measured: float | None = None, detail: str = "") -> Check:
    """``avg g <= bound``, with the multiplicative oracle's 1/rho, and VACUOUS where no gap was larger anyway."""
    bound /= run.oracle.rho
    seen = float(run.gap_upper.mean()) if measured is None else measured
    silent = _silent(run, bound)
    note = detail
    if silent:
        note += f"; vacuous: bound {bound:.3g} >= every gap"
    elif bound >= float(run.gap[0]):
        note += f"; the first gap, {run.gap[0]:.3g}, was below the bound already"
    return at_most(name, seen, bound, pairing_rounding(run), vacuous=silent, detail=note.lstrip("; "))


def constant_times_scale(run: Run, constant: float, name: str) -> Check:
    """``avg g <= constant * s + eps`` at the theorem's step, the statement of Theorem 4.1 for ``constant`` 2."""
    return _bounded(name, run, constant * run.scale + _error_term(run), detail=f"avg/s = {run.average / run.scale:.4f}")


def constant_step(run: Run) -> Check:
    """``avg g <= M/(eta T) + eta beta D^2/2 + eps`` for a multiple of the theorem's step, or a clipped one."""
    p = run.problem
    bound = theorem.constant_step_bound(p.M, p.beta, run.oracle.diameter, run.T, _constant_step(run))
    return _bounded(
        "constant-step bound", run, bound + _error_term(run), detail=f"avg/s = {run.average / run.scale:.4f}"
    )


def sharp(run: Run) -> Check:
    """``avg g <= drop/(eta T) + beta eta R^2 (1 + 1/(eta T)) / (2 (1 - eta)) + eps``."""
    eta = _constant_step(run)
    bound = theorem.sharp_bound(run.drop, run.problem.beta, run.oracle.circumradius, run.T, eta)
    if not math.isfinite(bound):
        return Check("sharp bound", VACUOUS, 0.0, run.average, bound, "eta = 1")
    slack = 2 * value_rounding(run) / (eta * run.T)
    return _bounded("sharp bound", run, bound + _error_term(run) + slack, detail=f"{bound / run.scale:.4f} s")


def weighted(run: Run) -> Check:
    """``sum eta (g - eps) / sum eta <= (M + beta D^2 sum eta^2 / 2) / sum eta``, for any step rule."""
    total = float(run.eta.sum())
    if total == 0:
        return Check("weighted bound", VACUOUS, 0.0, 0.0, 0.0, "every step was zero")
    p = run.problem
    bound = theorem.weighted_bound(p.M, p.beta, run.oracle.diameter, total, float(np.sum(run.eta**2)))
    seen = float(np.sum(run.eta * (run.gap - run.error))) / total
    return at_most(
        "weighted bound", seen, bound, pairing_rounding(run), vacuous=_silent(run, bound), detail="any steps"
    )


def short_step(run: Run) -> Check:
    """``min g <= max(2 h_1, beta D^2)/sqrt(T)`` for the short step with the full gradient."""
    p = run.problem
    bound = theorem.short_step_bound(p.M, p.beta, run.oracle.diameter, run.T)
    return at_most("short-step bound", run.smallest, bound, pairing_rounding(run), vacuous=_silent(run, bound))


def audit(run: Run) -> list[Check]:
    """Every check that applies to a run.

    Returns:
        The checks, those of the theorem last. A run is sound if none of them FAILs.
    """
    out = [check(run) for check in ALWAYS]
    if isinstance(run.step, TheoremStep):
        out += [step_size(run), two_sided(run) if run.oracle.exact else weighted(run)]
        eta = _constant_step(run)
        if run.step.factor == 1 and eta < 1:
            out += [
                constant_times_scale(run, theorem.PAPER, "theorem: 2 s"),
                constant_times_scale(run, theorem.FROM_SUBOPTIMALITY, "sharper: 1.5 s"),
            ]
        else:
            out.append(constant_step(run))
        out.append(sharp(run))
    else:
        out.append(weighted(run))
        if isinstance(run.step, ShortStep) and not run.estimator.noisy and run.oracle.exact and not _erring(run):
            out.append(short_step(run))
    return out


def _erring(run: Run) -> bool:
    return run.oracle.epsilon > 0 or run.oracle.rho < 1


def failures(checks: list[Check]) -> list[Check]:
    """The checks that FAIL."""
    return [check for check in checks if check.verdict == FAIL]
