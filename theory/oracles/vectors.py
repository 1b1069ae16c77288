"""Sets of vectors: the l1 ball, the simplex and the box; and the Frobenius ball, which takes any shape."""

from __future__ import annotations

import math

import numpy as np

from theory.arguments import count, positive
from theory.iterates import Gradient, Point, as_array
from theory.oracles.oracle import Answer, Oracle


def _length(name: str, n: int) -> tuple[int]:
    """The shape of a vector set, from its length."""
    return (count(name, n, "the length of the vectors"),)


class L1Ball(Oracle):
    """``{|x|_1 <= delta}`` in n dimensions: ``V = -delta sign(G_i) e_i`` at the largest ``|G_i|``; D = 2 delta."""

    def __init__(self, delta: float, n: int):
        self.delta = positive("delta", delta, "the l1 radius of K")
        self.shape, self.diameter, self.circumradius = _length("n", n), 2 * self.delta, self.delta

    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """The signed unit vector at the largest entry."""
        G = as_array(G)
        i = int(np.argmax(np.abs(G)))
        V = np.zeros(self.shape)
        V[i] = -self.delta if G[i] >= 0 else self.delta
        value = self.delta * abs(float(G[i]))
        return Answer(V, value, value)

    def support(self, G: np.ndarray) -> float:
        """``delta max |G_i|``."""
        return self.delta * float(np.linalg.norm(G, np.inf))

    def gauge(self, W: np.ndarray) -> float:
        """``|W|_1 / delta``."""
        return float(np.abs(W).sum()) / self.delta


class Simplex(Oracle):
    """``{x >= 0, sum x = delta}``: ``V = delta e_i`` at the smallest ``G_i``; ``D = sqrt(2) delta``."""

    def __init__(self, n: int, delta: float = 1.0):
        self.delta = positive("delta", delta, "the sum of the entries")
        self.shape = _length("n", n)
        self.diameter = math.sqrt(2) * self.delta if n > 1 else 0.0
        self.circumradius = self.delta * math.sqrt(1 - 1 / n)
        self.centre = np.full(self.shape, self.delta / n)

    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """The corner at the smallest entry."""
        G = as_array(G)
        i = int(np.argmin(G))
        V = np.zeros(self.shape)
        V[i] = self.delta
        value = -self.delta * float(G[i])
        return Answer(V, value, value)

    def support(self, G: np.ndarray) -> float:
        """``delta max G_i``."""
        return self.delta * float(G.max())

    def gauge(self, W: np.ndarray) -> float:
        """One plus the larger of the negative part and the error of the sum, both relative to ``delta``."""
        return 1 + max(-float(W.min()), abs(float(W.sum()) - self.delta)) / self.delta

    def start(self) -> np.ndarray:
        """The vertex ``delta e_1``."""
        W = np.zeros(self.shape)
        W[0] = self.delta
        return W


class Box(Oracle):
    """``{low <= x_i <= high}``: ``V_i = low`` where ``G_i > 0``, else ``high``; ``D = (high - low) sqrt(n)``."""

    def __init__(self, low: float, high: float, n: int = 1):
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"low must lie below high and both be finite, got {low!r} and {high!r}: swap or fix them")
        self.low, self.high, self.shape = float(low), float(high), _length("n", n)
        self.diameter = (self.high - self.low) * math.sqrt(n)
        self.circumradius = self.diameter / 2
        self.centre = np.full(self.shape, (self.low + self.high) / 2)

    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """The corner opposite to the gradient's signs."""
        G = as_array(G)
        V = np.where(G > 0, self.low, self.high)
        value = -float(np.dot(G, V))
        return Answer(V, value, value)

    def support(self, G: np.ndarray) -> float:
        """``<G, centre> + |G|_1 (high - low) / 2``."""
        return float(G.sum()) * (self.low + self.high) / 2 + float(np.abs(G).sum()) * (self.high - self.low) / 2

    def gauge(self, W: np.ndarray) -> float:
        """The largest distance of an entry from the centre, in half widths."""
        return float(np.abs(W - (self.low + self.high) / 2).max()) / ((self.high - self.low) / 2)

    def start(self) -> np.ndarray:
        """The centre."""
        return np.full(self.shape, (self.low + self.high) / 2)


class FrobeniusBall(Oracle):
    """``{|W|_F <= delta}`` for any shape: ``V = -delta G / |G|_F``; ``D = 2 delta``. The l2 ball for vectors."""

    def __init__(self, delta: float, shape: tuple[int, ...]):
        self.delta = positive("delta", delta, "the Frobenius radius of K")
        if not isinstance(shape, tuple) or not shape:
            raise ValueError(f"shape must be a tuple of positive whole numbers, got {shape!r}: give the shape of W")
        self.shape = tuple(count(f"shape[{i}]", s, "the shape of W") for i, s in enumerate(shape))
        self.diameter, self.circumradius = 2 * self.delta, self.delta

    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """The point of the sphere in the direction of ``-G``."""
        G = as_array(G)
        size = float(np.linalg.norm(G))
        if size == 0:  # every point minimises; return one of the sphere
            V = np.zeros(self.shape)
            V.flat[0] = self.delta
            return Answer(V, 0.0, 0.0)
        return Answer((-self.delta / size) * G, self.delta * size, self.delta * size)

    def support(self, G: np.ndarray) -> float:
        """``delta |G|_F``."""
        return self.delta * math.sqrt(float(np.sum(G * G)))

    def gauge(self, W: np.ndarray) -> float:
        """``|W|_F / delta``."""
        return float(np.linalg.norm(W)) / self.delta
