"""The interface of a problem: a loss with its gradient, the set ``K``, and the constants of Theorem 4.1.

Every problem states ``beta``, its smoothness on ``K``, and ``M >= L(W_1) - min_K L``, and says why they hold.
So a run is checked against the theorem and not against a guess.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from theory.arguments import count, nonnegative, positive
from theory.iterates import DensePoint, Gradient, Point
from theory.oracles import Oracle


class Problem(ABC):
    """A smooth loss over a convex compact set.

    Attributes:
        name: its name in tables. oracle: the set ``K``.
        beta: Lipschitz constant of the gradient on ``K``. M: bound on ``L(W_1) - min_K L``.
        magnitude: bound on the terms that ``L`` sums, which sets its rounding error; None uses ``|L|``.
        dtype: precision of the arithmetic.
    """

    name: str
    oracle: Oracle
    beta: float
    M: float
    magnitude: float | None = None
    dtype: Any = np.float64

    @abstractmethod
    def start(self) -> Point:
        """A fresh ``W_1``."""

    @abstractmethod
    def evaluate(self, W: Point) -> tuple[float, Gradient]:
        """``L(W)`` and its gradient."""

    def value(self, W: Point) -> float:
        """``L(W)``."""
        return self.evaluate(W)[0]

    def gradient(self, W: Point) -> Gradient:
        """The gradient of ``L`` at ``W``."""
        return self.evaluate(W)[1]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, M={self.M:.4g}, beta={self.beta:.4g}, K={self.oracle!r})"


class StochasticProblem(Problem):
    """A problem that also gives unbiased gradient estimates from batches.

    Attributes:
        sigma: bound on ``sqrt(E|xi|_F^2)`` of one draw over ``K``, or None if unknown.
        samples: size of the finite sum, or None for an endless supply.
    """

    sigma: float | None = None
    samples: int | None = None

    @abstractmethod
    def draw(self, rng: np.random.Generator, batch: int) -> Any:
        """Draw a batch of the given size, in a form that `batch_gradient` understands."""

    @abstractmethod
    def batch_gradient(self, W: Point, batch: Any) -> np.ndarray:
        """The gradient estimate at ``W`` from a batch; a batch may serve at several points."""


class DenseProblem(Problem):
    """A problem given by two functions of an array.

    Args:
        name: for tables. oracle: the set. value, gradient: functions of an array of the set's shape.
        beta, M, magnitude: see `Problem`. start: ``W_1``, by default the set's start.

    Raises:
        ValueError: a constant is not positive, or the start has another shape or lies outside the set.

    Example:
        >>> from theory.oracles import L1Ball
        >>> DenseProblem("quadratic", L1Ball(1.0, 3), lambda w: w @ w / 2, lambda w: w, beta=1, M=0.5)
        DenseProblem('quadratic', M=0.5, beta=1, K=L1Ball(shape=(3,), D=2))
    """

    def __init__(
        self,
        name: str,
        oracle: Oracle,
        value: Callable[[np.ndarray], float],
        gradient: Callable[[np.ndarray], np.ndarray],
        *,
        beta: float,
        M: float,
        start: np.ndarray | None = None,
        magnitude: float | None = None,
    ):
        self.name, self.oracle, self._value, self._gradient = name, oracle, value, gradient
        self.beta = positive("beta", beta, "the Lipschitz constant of the gradient on K")
        self.M = positive("M", M, "a bound on L(W_1) - min L over K")
        self._start = np.asarray(oracle.start() if start is None else start, dtype=float)
        self.magnitude = magnitude
        if self._start.shape != oracle.shape:
            raise ValueError(f"start must have the set's shape {oracle.shape}, got {self._start.shape}: reshape it")
        if oracle.gauge(self._start) > 1 + 1e-9:
            raise ValueError(f"start must lie in K, got a gauge of {oracle.gauge(self._start):.6g}: scale it down to 1")

    def start(self) -> Point:
        """A fresh ``W_1``."""
        return DensePoint(self._start)

    def evaluate(self, W: Point) -> tuple[float, Gradient]:
        """``L(W)`` and its gradient."""
        array = W.dense()
        return float(self._value(array)), self._gradient(array)

    def value(self, W: Point) -> float:
        """``L(W)``."""
        return float(self._value(W.dense()))


def quadratic(name: str, oracle: Oracle, target: np.ndarray, start: np.ndarray | None = None) -> DenseProblem:
    """``L(W) = |W - C|_F^2 / 2``: beta = 1 exactly, and ``M = L(W_1)`` because L is never negative.

    Args:
        target: ``C``. Inside ``K`` it is the optimum; outside, the optimum lies on the boundary.
    """
    C = np.asarray(target, dtype=float)
    W1 = oracle.start() if start is None else start
    return DenseProblem(
        name,
        oracle,
        lambda W: float(np.sum((W - C) ** 2)) / 2,
        lambda W: W - C,
        beta=1.0,
        M=max(float(np.sum((W1 - C) ** 2)) / 2, 1e-12),
        start=start,
    )


class NoisyProblem(StochasticProblem):
    """A dense problem with Gaussian noise of size ``sigma = sqrt(E|xi|_F^2)`` on its gradients.

    The noise of a batch of b draws has size ``sigma / sqrt(b)``. The loss has no noise.

    Args:
        problem: the problem without noise. sigma: root mean square Frobenius norm of one draw's noise.
    """

    def __init__(self, problem: Problem, sigma: float):
        self.problem = problem
        self.sigma = nonnegative("sigma", sigma, "the size of one draw's noise")
        self.name, self.oracle = f"{problem.name} with noise {sigma:g}", problem.oracle
        self.beta, self.M = problem.beta, problem.M
        self.magnitude, self.dtype = problem.magnitude, problem.dtype

    def operator_noise(self, batch: int) -> float | None:
        """Bound on ``E|xi|_op`` for a batch: the size of an entry times ``sqrt(m) + sqrt(n)``; None for vectors."""
        shape = self.oracle.shape
        if len(shape) != 2 or self.sigma is None:
            return None
        return self.sigma / math.sqrt(shape[0] * shape[1] * batch) * (math.sqrt(shape[0]) + math.sqrt(shape[1]))

    def start(self) -> Point:
        """The start of the problem."""
        return self.problem.start()

    def evaluate(self, W: Point) -> tuple[float, Gradient]:
        """The noiseless loss and gradient."""
        return self.problem.evaluate(W)

    def value(self, W: Point) -> float:
        """The noiseless loss."""
        return self.problem.value(W)

    def draw(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        """The averaged noise of ``batch`` draws."""
        assert self.sigma is not None
        shape = self.oracle.shape
        return rng.standard_normal(shape) * (self.sigma / math.sqrt(math.prod(shape) * batch))

    def batch_gradient(self, W: Point, batch: np.ndarray) -> np.ndarray:
        """The gradient plus the drawn noise."""
        G = self.problem.gradient(W)
        if not isinstance(G, np.ndarray):
            raise ValueError(f"problem must have dense gradients, got {type(G).__name__}: take a dense problem")
        return G + batch


class FiniteSum(StochasticProblem):
    """A mean of N smooth terms; a subclass sets ``samples`` and defines `part`, the mean over a subset.

    A batch is an array of indices, drawn with replacement.
    """

    _start: np.ndarray

    @abstractmethod
    def part(self, W: np.ndarray, index: np.ndarray | slice) -> tuple[float, np.ndarray]:
        """Mean loss and gradient over the indexed terms."""

    def start(self) -> Point:
        """A fresh ``W_1``."""
        return DensePoint(self._start)

    def evaluate(self, W: Point) -> tuple[float, Gradient]:
        """The full loss and gradient."""
        return self.part(W.dense(), slice(None))

    def draw(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        """Indices with replacement, which gives the estimate the variance ``sigma^2 / b``."""
        assert self.samples is not None
        return rng.integers(self.samples, size=count("batch", batch, "the number of samples per step"))

    def batch_gradient(self, W: Point, batch: np.ndarray) -> np.ndarray:
        """The mean gradient of the drawn terms."""
        return self.part(W.dense(), batch)[1]
