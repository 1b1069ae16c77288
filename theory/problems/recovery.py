"""Robust matrix recovery on the trace ball: sensing, dense completion, and completion over observed entries.

The loss is the mean of ``r^2 / (1 + r^2)`` over residuals r (Geman and McClure). An outlier costs at most 1, at
the price of convexity. The second derivative ``(2 - 6 r^2) / (1 + r^2)^3`` lies in [-1/2, 2], so
``beta = 2 |A|^2 / N`` holds for measurements ``A``. The loss is never negative, so ``M = L(W_1)`` holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from theory.arguments import count, positive
from theory.iterates import DensePoint, Gradient, ObservedMatrix, ObservedPoint, Pattern, Point, row_blocks
from theory.oracles import Oracle, TraceBall
from theory.problems.problem import FiniteSum, Problem
from theory.seeds import generator

OUTLIERS, OUTLIER_SCALE, NOISE = 0.05, 10.0, 0.1


def robust(r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``r^2 / (1 + r^2)`` and its derivative ``2 r / (1 + r^2)^2``, elementwise."""
    q = 1 / (1 + r * r)
    return 1 - q, 2 * r * q * q


@dataclass(frozen=True)
class LowRankData:
    """Noisy low-rank data with outliers.

    Attributes:
        Y: (m, n) observations. X: the truth. delta: ``|X|_*``, the radius at which X is feasible.
    """

    Y: np.ndarray
    X: np.ndarray
    delta: float


def low_rank_data(m: int, n: int, seed: int = 0, rank: int = 5) -> LowRankData:
    """``X = U V' / sqrt(rank)`` with Gaussian factors, and ``Y`` as `observe` gives it."""
    count("m", m, "the number of rows"), count("n", n, "the number of columns")
    rng = generator(seed)
    U, V = rng.standard_normal((m, rank)), rng.standard_normal((n, rank))
    X = U @ V.T / math.sqrt(rank)
    return LowRankData(observe(X, rng), X, product_trace_norm(U, V) / math.sqrt(rank))


def observe(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The values with Gaussian noise of size 0.1, and 5 % of them with outliers of size 10."""
    y = truth + NOISE * rng.standard_normal(truth.shape)
    hit = rng.random(truth.shape) < OUTLIERS
    y[hit] += OUTLIER_SCALE * rng.standard_normal(int(hit.sum()))
    return y


def product_trace_norm(U: np.ndarray, V: np.ndarray) -> float:
    """``|U V'|_*`` from the triangular factors of two QR decompositions."""
    left, right = np.linalg.qr(U)[1], np.linalg.qr(V)[1]
    return float(np.linalg.svd(left @ right.T, compute_uv=False).sum())


class DenseCompletion(Problem):
    """Every entry observed: ``L(W) = mean r^2/(1 + r^2)``, ``r = W - Y``; ``beta = 2/(mn)``, ``W_1 = 0``.

    One pass over row blocks that fit the cache computes loss and gradient.

    Args:
        Y: (m, n) observations. delta: trace-norm radius. oracle: another set of the same shape.
    """

    def __init__(self, Y: np.ndarray, delta: float, oracle: Oracle | None = None, name: str = "robust completion"):
        self.Y = np.ascontiguousarray(Y, dtype=float)
        self.oracle = TraceBall(delta, self.Y.shape) if oracle is None else oracle
        self.name = f"{name} {self.Y.shape[0]}x{self.Y.shape[1]}"
        self.beta = 2 / self.Y.size
        self.M = self.loss_into(np.zeros_like(self.Y), None)
        self.magnitude = 1.0

    def loss_into(self, W: np.ndarray, G: np.ndarray | None) -> float:
        """The loss; writes the gradient to ``G`` unless it is None."""
        total, weight = 0.0, 2 / W.size
        q = np.empty((0, 0))
        for rows in row_blocks(W):
            q = q if q.shape == W[rows].shape else np.empty_like(W[rows])
            # the residual uses the memory of the gradient
            r = np.subtract(W[rows], self.Y[rows], out=None if G is None else G[rows])
            np.multiply(r, r, out=q)
            q += 1
            np.reciprocal(q, out=q)
            total += q.size - float(q.sum())
            if G is not None:
                r *= q
                q *= weight
                r *= q
        return total / W.size

    def start(self) -> Point:
        """Zero."""
        return DensePoint(np.zeros_like(self.Y))

    def evaluate(self, W: Point) -> tuple[float, Gradient]:
        """Loss and gradient in one pass."""
        G = np.empty_like(self.Y)
        return self.loss_into(W.dense(), G), G

    def value(self, W: Point) -> float:
        """The loss alone."""
        return self.loss_into(W.dense(), None)


class ObservedCompletion(Problem):
    """Completion over an observed set; the iterate is a sum of atoms, and nothing of size mn is formed.

    ``L(W) = mean over the set of r^2/(1 + r^2)``; ``beta = 2/N`` for N observed entries, ``W_1 = 0``.

    Args:
        pattern: the observed set. y: the N observations in the pattern's order. delta: trace-norm radius.
        oracle: another set of rank-one vertices. dtype: float64, or float32 for half the memory.
        certify_steps: least number of Lanczos steps per gradient. With 40 the certified interval of the gap is about a
            tenth of the gap; with 0 steps are fastest, and the interval is several times the gap.
    """

    def __init__(
        self,
        pattern: Pattern,
        y: np.ndarray,
        delta: float,
        oracle: Oracle | None = None,
        dtype: Any = np.float64,
        name: str = "observed completion",
        certify_steps: int = 40,
    ):
        if y.shape != (len(pattern),):
            raise ValueError(f"y must hold one value per observed entry ({len(pattern)}), got shape {y.shape}")
        self.pattern, self.dtype = pattern, np.dtype(dtype)
        self.y: Any = pattern.native(y, dtype)
        own = TraceBall(delta, pattern.shape, method="lanczos", certify_steps=certify_steps)
        self.oracle = own if oracle is None else oracle
        self.name = f"{name} {pattern.shape[0]}x{pattern.shape[1]}, {len(pattern)} entries"
        self.beta = 2 / len(pattern)
        self.M = self.value(self.start())
        self.magnitude = 1.0

    def start(self) -> Point:
        """Zero, with no atoms."""
        return ObservedPoint(self.pattern, self.dtype)

    def _residual(self, W: Point) -> Any:
        if not isinstance(W, ObservedPoint):
            raise ValueError(f"W must be an ObservedPoint, got {type(W).__name__}: take it from start()")
        return W.values - self.y

    def evaluate(self, W: Point) -> tuple[float, Gradient]:
        """Loss and gradient on the observed set; the mean runs in float64."""
        r = self._residual(W)
        q = 1 / (1 + r * r)
        value = 1 - float(q.mean(dtype=float))
        q *= q
        r *= q
        r *= 2 / len(r)
        return value, ObservedMatrix(self.pattern, r)

    def value(self, W: Point) -> float:
        """The loss alone."""
        r = self._residual(W)
        return 1 - float((1 / (1 + r * r)).mean(dtype=float))


def observed_completion(
    m: int, n: int, entries: int, seed: int = 0, rank: int = 5, dtype: Any = np.float64, certify_steps: int = 40
) -> ObservedCompletion:
    """An `ObservedCompletion` with data like `low_rank_data`, but without a dense matrix."""
    entries = count("entries", entries, "the number of observed entries")
    if entries > m * n // 2:
        raise ValueError(f"entries must be at most half of {m} x {n}, got {entries}: use DenseCompletion")
    rng = generator(seed)
    flat = np.unique(rng.integers(m * n, size=entries + entries // 8))
    flat = np.sort(rng.permutation(flat)[:entries])
    pattern = Pattern(flat // n, flat % n, (m, n))
    U, V = rng.standard_normal((m, rank)), rng.standard_normal((n, rank))
    y = np.zeros(len(pattern))
    for k in range(rank):
        y += U[pattern.rows, k] * V[pattern.cols, k]
    y /= math.sqrt(rank)
    delta = product_trace_norm(U, V) / math.sqrt(rank)
    return ObservedCompletion(pattern, observe(y, rng), delta, dtype=dtype, certify_steps=certify_steps)


class Sensing(FiniteSum):
    """Robust sensing: ``y_i = <A_i, X>`` with noise and outliers; ``beta = 2 sigma_1(A)^2 / N``.

    Args:
        m, n: shape of W. measurements: N. seed: of the data.
        oracle: by default the trace ball of radius ``|X|_*``.
    """

    def __init__(self, m: int, n: int, measurements: int, seed: int = 0, oracle: Oracle | None = None):
        self.samples = count("measurements", measurements, "the number of measurements")
        rng = generator(seed)
        X = rng.standard_normal((m, 1)) @ rng.standard_normal((1, n)) / math.sqrt(m * n)
        self.A = rng.standard_normal((self.samples, m * n))
        self.y = observe(self.A @ X.ravel(), rng)
        delta = positive("delta", float(np.linalg.norm(X, "nuc")), "a truth that is not zero")
        self.oracle = TraceBall(delta, (m, n)) if oracle is None else oracle
        self.name = f"robust sensing {m}x{n}, {measurements} measurements"
        self._start = np.zeros((m, n))
        self.beta = 2 * float(np.linalg.norm(self.A, 2)) ** 2 / self.samples
        self.M = self.part(self._start, slice(None))[0]
        # the derivative of r^2/(1+r^2) is at most 3 sqrt(3)/8, at r = 1/sqrt(3); and E|xi|^2 <= E|g|^2
        self.sigma = 3 * math.sqrt(3) / 8 * math.sqrt(float(np.mean(np.sum(self.A**2, axis=1))))
        self.magnitude = 1.0

    def part(self, W: np.ndarray, index: np.ndarray | slice) -> tuple[float, np.ndarray]:
        """Mean over the indexed measurements."""
        A = self.A[index]
        loss, slope = robust(A @ W.ravel() - self.y[index])
        return float(loss.mean()), (slope @ A / slope.size).reshape(W.shape)
