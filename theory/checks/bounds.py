"""The theorem's bounds on one run: the two-sided law, 2 s, 1.5 s, the sharp bound, and those for other steps."""

from __future__ import annotations

import math

import numpy as np

from theory import theorem
from theory.checks.check import Check, at_most, vacuous
from theory.checks.record import pairing_rounding, value_rounding
from theory.checks.steps import promised_step
from theory.frank_wolfe import Run
from theory.step_sizes import ShortStep, TheoremStep


def two_sided(run: Run) -> Check:
    """``avg (g - eps)`` lies in ``drop/(eta T) -+ eta beta D^2/2``; at the theorem's step ``s (drop/M -+ 1/2)``."""
    p, eta = run.problem, promised_step(run)
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


def _error_term(run: Run) -> float:
    """The ``eps`` of the bound: the error that the oracle admits to, or the measured mean for an estimated gradient."""
    if run.estimator.noisy or not run.oracle.exact:
        return float((run.error + run.gap_upper - run.gap).mean())
    return run.oracle.epsilon


def _silent(run: Run, bound: float) -> bool:
    """Whether a bound says nothing, because no gap of the run exceeds it.

    Not only the first gap counts: instance A starts next to a maximum, and its gap rises from almost zero.
    """
    return bound >= float(run.gap.max())


def _bounded(name: str, run: Run, bound: float, measured: float | None = None, detail: str = "") -> Check:
    """``avg g <= bound / rho``; VACUOUS where no gap was larger anyway."""
    bound /= run.oracle.rho
    seen = float(run.gap_upper.mean()) if measured is None else measured
    silent = _silent(run, bound)
    note = detail
    if silent:
        note += f"; vacuous: bound {bound:.3g} >= every gap"
    elif bound >= float(run.gap[0]):
        note += f"; the first gap, {run.gap[0]:.3g}, was below the bound already"
    return at_most(name, seen, bound, pairing_rounding(run), vacuous=silent, detail=note.lstrip("; "))


def multiple_of_scale(run: Run, constant: float, name: str) -> Check:
    """``avg g <= constant * s + eps`` at the theorem's step; with 2 this is Theorem 4.1 as printed."""
    return _bounded(name, run, constant * run.scale + _error_term(run), detail=f"avg/s = {run.average / run.scale:.4f}")


def constant_step(run: Run) -> Check:
    """``avg g <= M/(eta T) + eta beta D^2/2 + eps`` for a multiple of the theorem's step, or a clipped one."""
    p = run.problem
    bound = theorem.constant_step_bound(p.M, p.beta, run.oracle.diameter, run.T, promised_step(run))
    return _bounded(
        "constant-step bound", run, bound + _error_term(run), detail=f"avg/s = {run.average / run.scale:.4f}"
    )


def sharp(run: Run) -> Check:
    """``avg g <= drop/(eta T) + beta eta R^2 (1 + 1/(eta T)) / (2 (1 - eta)) + eps``."""
    eta = promised_step(run)
    bound = theorem.sharp_bound(run.drop, run.problem.beta, run.oracle.circumradius, run.T, eta)
    if not math.isfinite(bound):
        return vacuous("sharp bound", "eta = 1", measured=run.average, bound=bound)
    slack = 2 * value_rounding(run) / (eta * run.T)
    return _bounded("sharp bound", run, bound + _error_term(run) + slack, detail=f"{bound / run.scale:.4f} s")


def weighted(run: Run) -> Check:
    """``sum eta (g - eps) / sum eta <= (M + beta D^2 sum eta^2 / 2) / sum eta``, for any step rule."""
    total = float(run.eta.sum())
    if total == 0:
        return vacuous("weighted bound", "every step was zero", measured=0.0)
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


def bounds_on(run: Run) -> list[Check]:
    """The bounds that apply to a run; they depend on its step rule and its oracle."""
    erring = run.oracle.epsilon > 0 or run.oracle.rho < 1
    if not isinstance(run.step, TheoremStep):
        short = isinstance(run.step, ShortStep) and not run.estimator.noisy and run.oracle.exact and not erring
        return [weighted(run), short_step(run)] if short else [weighted(run)]
    out = [two_sided(run) if run.oracle.exact else weighted(run)]
    if run.step.factor == 1 and promised_step(run) < 1:
        out.append(multiple_of_scale(run, theorem.PAPER, "theorem: 2 s"))
        out.append(multiple_of_scale(run, theorem.FROM_SUBOPTIMALITY, "sharper: 1.5 s"))
    else:
        out.append(constant_step(run))
    return [*out, sharp(run)]
