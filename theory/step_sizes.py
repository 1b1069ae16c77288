"""Step rules: how far to move from ``W_t`` towards ``V_t``.

A rule is a frozen description that can be shared and printed. ``rule.begin(constants, T)`` returns the
function of one run, which holds the state of that run.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from theory import theorem
from theory.arguments import positive


@dataclass(frozen=True)
class Constants:
    """The constants ``M``, ``beta`` and ``D`` of a problem."""

    M: float
    beta: float
    D: float


@dataclass(frozen=True)
class Situation:
    """The input of a rule in iteration t.

    Attributes:
        t: counts from 1. value: ``L(W_t)``.
        descent: ``<G_t, W_t - V_t>`` with the estimated gradient. distance2: ``|V_t - W_t|^2``.
        trial: the function ``eta -> L(W_t + eta (V_t - W_t))``.
    """

    t: int
    value: float
    descent: float
    distance2: float
    trial: Callable[[float], float]


Rule = Callable[[Situation], float]


class Step(ABC):
    """Base class of the step rules; the command line and the tables use ``name``."""

    name: str

    @abstractmethod
    def begin(self, constants: Constants, T: int) -> Rule:
        """The rule of one run of T steps."""


@dataclass(frozen=True)
class TheoremStep(Step):
    """The constant step of Theorem 4.1, ``eta = factor sqrt(M) / (D sqrt(beta T))``, clipped to 1.

    ``factor`` sqrt(2) gives 1.414 s in general; sqrt(8) gives 0.707 s on norm balls.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        positive("factor", self.factor, "the multiple of the theorem's step; 1 is the theorem's")

    @property
    def name(self) -> str:  # type: ignore[override]
        """``theorem``, ``sqrt2``, ``sqrt8``, or the factor in digits."""
        known = {1.0: "theorem", math.sqrt(2): "sqrt2", math.sqrt(8): "sqrt8"}
        return known.get(self.factor, f"theorem*{self.factor:g}")

    def begin(self, constants: Constants, T: int) -> Rule:
        """The same step in every iteration."""
        eta = theorem.theorem_step(constants.M, constants.beta, constants.D, T, self.factor)
        return lambda situation: eta


@dataclass(frozen=True)
class ShortStep(Step):
    """``min(1, <G, W - V> / (beta |V - W|^2))``, the minimiser of the quadratic upper bound (Demyanov and Rubinov)."""

    name = "short"

    def begin(self, constants: Constants, T: int) -> Rule:
        """Uses ``beta`` only."""

        def rule(now: Situation) -> float:
            curvature = constants.beta * now.distance2
            return min(1.0, max(0.0, now.descent) / curvature) if curvature > 0 else 0.0

        return rule


@dataclass(frozen=True)
class Backtracking(Step):
    """The short step with an estimated curvature (Pedregosa, Negiar, Askari, Jaggi, arXiv 1806.05123).

    The estimate shrinks by ``shrink`` at each iteration and grows by ``grow`` until the quadratic upper bound
    holds. The slack of that test is relative to ``|L|``: an absolute slack never stops on a loss of 1e6 and
    accepts anything on a loss of 1e-9.
    """

    shrink: float = 0.9
    grow: float = 2.0
    slack: float = 1e-12
    name = "backtracking"

    def begin(self, constants: Constants, T: int) -> Rule:
        """Starts from a hundredth of ``beta``; the true ``beta`` caps the growth."""
        estimate = constants.beta / 100

        def rule(now: Situation) -> float:
            nonlocal estimate
            if now.distance2 == 0 or now.descent <= 0:
                return 0.0
            estimate = max(estimate * self.shrink, 1e-12 * constants.beta)
            while True:
                eta = min(1.0, now.descent / (estimate * now.distance2))
                promised = now.value - eta * now.descent + eta**2 * estimate * now.distance2 / 2
                if estimate >= constants.beta or now.trial(eta) <= promised + self.slack * abs(now.value):
                    return eta
                estimate = min(estimate * self.grow, constants.beta)

        return rule


@dataclass(frozen=True)
class OpenLoop(Step):
    """``2 / (t + 2)`` counted from t = 0: the classical step of convex Frank-Wolfe (Jaggi, 2013)."""

    name = "2/(t+2)"

    def begin(self, constants: Constants, T: int) -> Rule:
        """Uses no constant of the problem."""
        return lambda now: 2 / (now.t + 1)


@dataclass(frozen=True)
class RootStep(Step):
    """``1 / sqrt(t + 1)`` counted from t = 0: the anytime version of the theorem's rate, up to a logarithm."""

    name = "1/sqrt(t+1)"

    def begin(self, constants: Constants, T: int) -> Rule:
        """Uses no constant of the problem."""
        return lambda now: 1 / math.sqrt(now.t)


@dataclass(frozen=True)
class PowerStep(Step):
    """The constant step ``factor T^power``, clipped to 1; ``T^(-3/4)`` is that of momentum at a fixed batch."""

    power: float = -0.75
    factor: float = 1.0

    def __post_init__(self) -> None:
        positive("factor", self.factor, "the multiple of the power of T")

    @property
    def name(self) -> str:  # type: ignore[override]
        """``T^-0.75``, with the factor in front."""
        return f"{'' if self.factor == 1 else f'{self.factor:g} '}T^{self.power:g}"

    def begin(self, constants: Constants, T: int) -> Rule:
        """The same step in every iteration; uses no constant of the problem."""
        eta = min(1.0, self.factor * T**self.power)
        return lambda situation: eta


STEPS: dict[str, Step] = {
    step.name: step
    for step in (
        TheoremStep(),
        TheoremStep(math.sqrt(2)),
        TheoremStep(math.sqrt(8)),
        ShortStep(),
        Backtracking(),
        OpenLoop(),
        RootStep(),
    )
}
