"""Gradient estimators: how a stochastic version of Algorithm 2 estimates the gradient.

An estimator is a frozen description, and ``begin(problem, rng)`` returns the estimate function of one run. That
function receives the iteration, the iterate and the true gradient, which the run computes anyway to measure the
gap. Only `FullGradient` and the snapshots of `SVRF` and `SPIDER` may return the true gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from theory.arguments import count, fraction
from theory.iterates import Gradient, Point
from theory.problems import Problem, StochasticProblem

Estimate = Callable[[int, Point, Gradient], Gradient]


def _stochastic(problem: Problem, name: str) -> StochasticProblem:
    if not isinstance(problem, StochasticProblem):
        raise ValueError(
            f"gradient must be FullGradient() for {problem.name!r}, got {name}: the problem draws no batches; "
            "wrap it in NoisyProblem, or take a finite sum"
        )
    return problem


def _array(G: Gradient) -> np.ndarray:
    if not isinstance(G, np.ndarray):
        raise ValueError(f"G must be dense for a variance-reduced estimate, got {type(G).__name__}")
    return G


class Estimator(ABC):
    """Base class of the estimators; ``noisy`` is False only for the exact gradient."""

    name: str
    noisy = True

    @abstractmethod
    def begin(self, problem: Problem, rng: np.random.Generator) -> Estimate:
        """The estimate function of one run."""

    def second(self) -> tuple[float, float, float, int] | None:
        """The definition of the second estimate of a run, which `theory.checks.noise` tests; None if unknown.

        Returns:
            ``(a, b, c, batch)``, where the estimate is ``a grad(W_1) + b mean_B1 g(W_1) + c mean_B2 g(W_2)``. The
            batches are independent for ``a = 0``. Otherwise ``a = 1``, and both terms use one batch.
        """
        return None


@dataclass(frozen=True)
class FullGradient(Estimator):
    """The exact gradient: the algorithm of Theorem 4.1."""

    name = "full"
    noisy = False

    def begin(self, problem: Problem, rng: np.random.Generator) -> Estimate:
        """Returns the true gradient."""
        return lambda t, W, G: G


@dataclass(frozen=True)
class Minibatch(Estimator):
    """The mean over a fresh batch (SFW; Reddi, Sra, Poczos, Smola, arXiv 1607.08254).

    Args:
        batch: ``b``, or for increasing batches a function of the iteration t = 1, 2, …
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
        """Draws a new batch at every step."""
        source = _stochastic(problem, "Minibatch")
        return lambda t, W, G: source.batch_gradient(W, source.draw(rng, self._size(t)))

    def second(self) -> tuple[float, float, float, int]:
        """The mean over the second batch."""
        return 0.0, 0.0, 1.0, self._size(2)

    def _size(self, t: int) -> int:
        return self.batch(t) if callable(self.batch) else self.batch


def _moving_average(
    source: StochasticProblem, batch: int, rng: np.random.Generator, share: Callable[[int], float]
) -> Estimate:
    """Estimates that give each new batch its ``share`` at step t; the first is the first batch."""
    average: np.ndarray | None = None

    def estimate(t: int, W: Point, G: Gradient) -> Gradient:
        nonlocal average
        fresh = source.batch_gradient(W, source.draw(rng, batch))
        weight = share(t)
        average = fresh if average is None else (1 - weight) * average + weight * fresh
        return average

    return estimate


@dataclass(frozen=True)
class Momentum(Estimator):
    """``d_t = (1 - r_t) d_{t-1} + r_t g_t`` with ``r_t = (t+1)^(-2/3)`` (Mokhtari et al., arXiv 1804.09554).

    It converges with one sample per step, at a slower rate.
    """

    batch: int = 1
    power: float = 2 / 3

    @property
    def name(self) -> str:  # type: ignore[override]
        """``momentum, batch 1``."""
        return f"momentum, batch {self.batch}"

    def begin(self, problem: Problem, rng: np.random.Generator) -> Estimate:
        """Starts from the first batch."""
        source = _stochastic(problem, "Momentum")
        return _moving_average(source, self.batch, rng, lambda t: (t + 1) ** -self.power)

    def second(self) -> tuple[float, float, float, int]:
        """A weighted mean of two independent batches."""
        share = 3**-self.power
        return 0.0, 1 - share, share, self.batch


@dataclass(frozen=True)
class FixedMomentum(Estimator):
    """``d_t = (1 - share) d_{t-1} + share g_t`` with one share for the run, as in Muon and Lion; ``d_1 = g_1``.

    With a share of ``T^(-1/2)`` and steps of ``T^(-3/4)`` one sample per step is enough for a gap of ``T^(-1/4)``.

    Args:
        share: in (0, 1]; 1 is a fresh batch in every step. batch: samples per step.
    """

    share: float
    batch: int = 1

    def __post_init__(self) -> None:
        fraction("share", self.share, "the weight of the newest batch")
        count("batch", self.batch, "the number of samples per step")

    @property
    def name(self) -> str:  # type: ignore[override]
        """``momentum of share 0.1, batch 1``."""
        return f"momentum of share {self.share:.3g}, batch {self.batch}"

    def begin(self, problem: Problem, rng: np.random.Generator) -> Estimate:
        """Starts from the first batch."""
        source = _stochastic(problem, "FixedMomentum")
        return _moving_average(source, self.batch, rng, lambda t: self.share)

    def second(self) -> tuple[float, float, float, int]:
        """A weighted mean of two independent batches."""
        return 0.0, 1 - self.share, self.share, self.batch


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

    def second(self) -> tuple[float, float, float, int] | None:
        """The gradient at the first point, corrected on one batch."""
        return (1.0, -1.0, 1.0, self.batch) if self.period > 1 else None


@dataclass(frozen=True)
class SPIDER(Estimator):
    """``d_t = d_{t-1} + g(W_t, B) - g(W_{t-1}, B)``, restarted every ``period`` steps (Fang et al., arXiv 1807.01695).

    Its differences are small because the steps are small. No better estimator for Frank-Wolfe is known.
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

    def second(self) -> tuple[float, float, float, int] | None:
        """The gradient at the first point, corrected on one batch."""
        return (1.0, -1.0, 1.0, self.batch) if self.period > 1 else None


#: the noisy estimators that the standard suite runs
ESTIMATORS: tuple[Estimator, ...] = (
    Minibatch(16),
    Minibatch(lambda t: t),
    Momentum(16),
    SVRF(16, 32),
    SPIDER(16, 32),
)
