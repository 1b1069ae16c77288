"""Gradient estimators for the stochastic versions of Algorithm 2.

An estimator is a frozen description; ``begin(problem, rng)`` gives the function of one run. It is called
with the iteration, the iterate and the true gradient, which the run computes anyway to measure the gap;
only `FullGradient` and the snapshots of `SVRF` and `SPIDER` may return it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from theory.arguments import count
from theory.iterates import Gradient, Point
from theory.problems import Problem, StochasticProblem

Estimate = Callable[[int, Point, Gradient], Gradient]


def _stochastic(problem: Problem, name: str) -> StochasticProblem:
    if not isinstance(problem, StochasticProblem):
        raise ValueError(
            f"gradient must be FullGradient() for {problem.name!r}, got {name}: it draws no batches; "
            "wrap it in NoisyProblem, or take a finite sum"
        )
    return problem


def _array(G: Gradient) -> np.ndarray:
    if not isinstance(G, np.ndarray):
        raise ValueError(f"G must be dense for a variance-reduced estimate, got {type(G).__name__}")
    return G


class Estimator(ABC):
    """How the algorithm sees the gradient; ``noisy`` is False only for the exact one."""

    name: str
    noisy = True

    @abstractmethod
    def begin(self, problem: Problem, rng: np.random.Generator) -> Estimate:
        """The estimator of one run."""


@dataclass(frozen=True)
class FullGradient(Estimator):
    """The exact gradient: the algorithm of Theorem 4.1."""

    name = "full"
    noisy = False

    def begin(self, problem: Problem, rng: np.random.Generator) -> Estimate:
        """Hands the true gradient on."""
        return lambda t, W, G: G


@dataclass(frozen=True)
class Minibatch(Estimator):
    """The mean over a fresh batch (SFW; Reddi, Sra, Poczos, Smola, arXiv 1607.08254).

    Args:
        batch: ``b``, a number, or a function of the iteration t = 1, 2, … for increasing batches.
    """

    batch: int | Callable[[int], int]

    def __post_init__(self) -> None:
        if not callable(self.batch):
            count("batch", self.batch, "the number of samples per step")

    @property
    def name(self) -> str:  # type: ignore[override]
        """``batch 16``, or ``increasing batch``."""
        return "increasing batch" if callable(self.batch) else f"batch {self.batch}"

    def begin(self, problem: Problem, rng: np.random.Generator) -> Estimate:
        """Draws anew at every step."""
        source, batch = _stochastic(problem, "Minibatch"), self.batch
        return lambda t, W, G: source.batch_gradient(W, source.draw(rng, batch(t) if callable(batch) else batch))


@dataclass(frozen=True)
class Momentum(Estimator):
    """``d_t = (1 - r_t) d_{t-1} + r_t g_t`` with ``r_t = (t+1)^(-2/3)`` (Mokhtari, Hassani, Karbasi, arXiv
    1804.09554).

    One sample per step suffices for convergence, at a slower rate.
    """

    batch: int = 1
    power: float = 2 / 3

    @property
    def name(self) -> str:  # type: ignore[override]
        """``momentum, batch 1``."""
        return f"momentum, batch {self.batch}"

    def begin(self, problem: Problem, rng: np.random.Generator) -> Estimate:
        """Starts from the first batch itself."""
        source = _stochastic(problem, "Momentum")
        average: np.ndarray | None = None

        def estimate(t: int, W: Point, G: Gradient) -> Gradient:
            nonlocal average
            fresh = source.batch_gradient(W, source.draw(rng, self.batch))
            share = (t + 1) ** -self.power
            average = fresh if average is None else (1 - share) * average + share * fresh
            return average

        return estimate


@dataclass(frozen=True)
class SVRF(Estimator):
    """Full gradient at a snapshot, corrected by ``g(W_t, B) - g(snapshot, B)`` (Hazan and Luo, arXiv 1602.02101)."""

    batch: int = 16
    period: int = 32

    @property
    def name(self) -> str:  # type: ignore[override]
        """``SVRF, batch 16``."""
        return f"SVRF, batch {self.batch}"

    def begin(self, problem: Problem, rng: np.random.Generator) -> Estimate:
        """Takes a snapshot every ``period`` steps."""
        source = _stochastic(problem, "SVRF")
        snapshot: Point | None = None
        anchor: np.ndarray | None = None

        def estimate(t: int, W: Point, G: Gradient) -> Gradient:
            nonlocal snapshot, anchor
            if snapshot is None or anchor is None or (t - 1) % self.period == 0:
                snapshot, anchor = W.copy(), _array(G)
                return anchor
            batch = source.draw(rng, self.batch)
            return anchor + source.batch_gradient(W, batch) - source.batch_gradient(snapshot, batch)

        return estimate


@dataclass(frozen=True)
class SPIDER(Estimator):
    """``d_t = d_{t-1} + g(W_t, B) - g(W_{t-1}, B)``, restarted every ``period`` steps (Fang, Li, Lin,
    Zhang, 1807.01695).

    The differences are small because the steps are, which is what makes it the best known for Frank-Wolfe.
    """

    batch: int = 16
    period: int = 32

    @property
    def name(self) -> str:  # type: ignore[override]
        """``SPIDER, batch 16``."""
        return f"SPIDER, batch {self.batch}"

    def begin(self, problem: Problem, rng: np.random.Generator) -> Estimate:
        """Keeps the previous iterate."""
        source = _stochastic(problem, "SPIDER")
        previous: Point | None = None
        running: np.ndarray | None = None

        def estimate(t: int, W: Point, G: Gradient) -> Gradient:
            nonlocal previous, running
            if previous is None or running is None or (t - 1) % self.period == 0:
                running = _array(G)
            else:
                batch = source.draw(rng, self.batch)
                running = running + source.batch_gradient(W, batch) - source.batch_gradient(previous, batch)
            previous = W.copy()
            return running

        return estimate
