"""How far each constant of an instance may be off before a check fails: ``python -m theory.fw_gap --sensitivity``.

A constant is changed by a percentage, Algorithm 2 runs with it, and the checks of the run are made. ``beta``, ``M`` and
``C_f`` are bounds, and a larger bound is true as well; so they are made smaller only. The others are exact and are made
smaller and larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from theory.checks import Check, audit, failures, record
from theory.checks.noise import gaussian_noise, noise_bound
from theory.frank_wolfe import Run, frank_wolfe
from theory.gradient_estimators import Minibatch
from theory.oracles import AdditiveError
from theory.problems import NoisyProblem, Problem, StochasticProblem
from theory.problems.instances import INSTANCES

#: the percentages that are tried, in rising order
PERCENT = (0.1, 1, 2, 5, 10, 20, 30, 50, 75, 90)

#: the constants, and whether each is a bound, of which only smaller values are wrong
CONSTANTS = {"beta": True, "M": True, "C_f": True, "D": False, "R": False, "sigma": False, "epsilon": False}

#: the instances of the table, and the length of their runs
HORIZONS = {
    name: {"G": 200, "completion": 100, "observed": 100}.get(name, 1000)
    for name in INSTANCES
    if not name.startswith("quadratic-")
}


def seen(name: str, constant: str, factor: float, T: int | None = None) -> bool | None:
    """Whether a check fails on an instance whose constant is wrong by a factor.

    Args:
        name: key of `INSTANCES`. constant: key of `CONSTANTS`. factor: such as 0.9 for a tenth too small.
        T: length of the run; by default that of the table.

    Returns:
        None if the instance has no such constant: an error can only be planted over an exact oracle, and noise only
        in a dense gradient.
    """
    T = HORIZONS[name] if T is None else T
    problem = INSTANCES[name].build(T, 0)
    checks = _PLANTS[constant](problem, T, factor)
    return None if checks is None else bool(failures(checks))


def signs(name: str, constant: str) -> tuple[int, ...]:
    """In which directions a constant of an instance can be wrong; ``sigma`` of a finite sum is a bound too."""
    bound = constant == "sigma" and isinstance(INSTANCES[name].build(1, 0), StochasticProblem)
    return (-1,) if bound or CONSTANTS[constant] else (-1, 1)


def least(name: str, constant: str) -> float | None:
    """The least percentage of `PERCENT` at which a wrong constant is seen; NaN if none is, None if there is none."""
    low, high = 0, len(PERCENT)
    while low < high:
        middle = (low + high) // 2
        verdicts = [seen(name, constant, 1 + sign * PERCENT[middle] / 100) for sign in signs(name, constant)]
        if None in verdicts:
            return None
        low, high = (low, middle) if all(verdicts) else (middle + 1, high)
    return PERCENT[low] if low < len(PERCENT) else math.nan


#: the head of the Markdown table
HEAD = "| instance | T | β | M | C_f | D | R | σ | ε |\n" + "|---" * (2 + len(CONSTANTS)) + "|"


def row(name: str) -> str:
    """The table's row of an instance: for each constant, by how much it must be off before a check fails."""
    cells = [_shown(least(name, constant), len(signs(name, constant)) == 1) for constant in CONSTANTS]
    return f"| {name} | {HORIZONS[name]} | " + " | ".join(cells) + " |"


def _shown(percent: float | None, bound: bool) -> str:
    if percent is None:
        return "–"
    return "no" if math.isnan(percent) else f"{'−' if bound else '±'}{percent:g} %"


def _constant(problem: Problem, T: int, factor: float, name: str) -> list[Check]:
    """The checks of a run whose problem claims another constant; the step follows the claim."""
    setattr(problem, name, factor * getattr(problem, name))
    return audit(frank_wolfe(problem, T))


def _size(problem: Problem, T: int, factor: float, name: str) -> list[Check]:
    setattr(problem.oracle, name, factor * getattr(problem.oracle, name))
    return audit(frank_wolfe(problem, T))


def _curvature(problem: Problem, T: int, factor: float) -> list[Check]:
    """``C_f = beta D^2`` too small: the curvature of each step is judged as if the step had the length D."""
    run = frank_wolfe(problem, T)
    problem.beta *= factor
    long = replace(run, distance2=np.full(T, problem.oracle.diameter**2))
    return [record.curvature(long), record.descent(long), record.reverse_descent(long)]


class _Scaled(NoisyProblem):
    """Its noise is larger than it says."""

    factor = 1.0

    def draw(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        return self.factor * super().draw(rng, batch)


def _noise(problem: Problem, T: int, factor: float) -> list[Check] | None:
    """``sigma`` wrong: the noise is larger than claimed by ``1 / factor``, or the bound of a finite sum smaller."""
    if isinstance(problem, StochasticProblem):
        assert problem.sigma is not None
        problem.sigma *= factor
        return [noise_bound(frank_wolfe(problem, T, gradient=Minibatch(16)))]
    if not isinstance(problem.gradient(problem.start()), np.ndarray):
        return None
    noisy = _Scaled(problem, 1.0)
    noisy.factor = 1 / factor
    return [gaussian_noise([frank_wolfe(noisy, T, gradient=Minibatch(16))], 16)]


def _error(problem: Problem, T: int, factor: float) -> list[Check] | None:
    """``epsilon`` wrong: the oracle admits to ``factor`` times the error that it spends, half of an average gap."""
    if not problem.oracle.exact:
        return None
    epsilon = frank_wolfe(problem, T, snapshots=0).average / 2
    run: Run = frank_wolfe(problem, T, oracle=AdditiveError(problem.oracle, epsilon))
    return audit(replace(run, oracle=AdditiveError(problem.oracle, factor * epsilon)))


_PLANTS: dict[str, Callable[[Any, int, float], list[Check] | None]] = {
    "beta": lambda problem, T, factor: _constant(problem, T, factor, "beta"),
    "M": lambda problem, T, factor: _constant(problem, T, factor, "M"),
    "C_f": _curvature,
    "D": lambda problem, T, factor: _size(problem, T, factor, "diameter"),
    "R": lambda problem, T, factor: _size(problem, T, factor, "circumradius"),
    "sigma": _noise,
    "epsilon": _error,
}
