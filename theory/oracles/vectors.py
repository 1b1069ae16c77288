"""Linear minimisation oracles: ``V = argmin_{V in K} <V, G>``, one abstract type with one call.

An oracle *is* its set ``K``: it knows the diameter ``D`` and circumradius ``R`` in the Frobenius norm,
tells how far a point lies outside, and evaluates the support function by its dual norm, a route that
shares nothing with the call. Matrix sets are in `theory.oracles.matrices`, oracles that err on purpose in
`theory.oracles.inexact`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from theory.arguments import count, positive
from theory.iterates import Gradient, Point, Vertex, as_array


@dataclass(frozen=True)
class Answer:
    """What an oracle returns for a gradient ``G``.

    Attributes:
        vertex: ``V`` in ``K``.
        attained: ``<-G, V>``, a lower end for the support ``max_{V in K} <-G, V>``.
        certified: an upper end for that support; equal to ``attained`` for an exact oracle.
    """

    vertex: Vertex
    attained: float
    certified: float


class Oracle(ABC):
    """A convex compact set ``K`` with its linear minimisation oracle.

    Attributes:
        shape: shape of the points of ``K``.
        diameter: ``D = max |V - W|_F`` over ``K``. circumradius: ``R``, the radius of the smallest ball
            around ``K``.
        epsilon: the additive error ``eps`` that the oracle admits to; 0 unless corrupted.
        rho: the fraction of the gap that its vertices keep at least; 1 unless corrupted.
        exact: whether ``attained == certified`` always.
    """

    shape: tuple[int, ...]
    diameter: float
    circumradius: float
    epsilon: float = 0.0
    rho: float = 1.0
    exact: bool = True

    @abstractmethod
    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """Minimise ``<V, G>`` over ``K``.

        Args:
            G: a gradient of this set's shape. at: the iterate, which only corrupted oracles look at.
            rng: source of whatever is random inside.
        """

    @abstractmethod
    def support(self, G: np.ndarray) -> float:
        """The exact support ``max_{V in K} <G, V>`` of a dense array, by the dual norm."""

    @abstractmethod
    def gauge(self, W: np.ndarray) -> float:
        """How large ``W`` is in units of ``K``: at most 1 inside, above 1 by the relative excess outside."""

    @abstractmethod
    def start(self) -> np.ndarray:
        """A natural starting point of ``K``."""

    def gap(self, G: np.ndarray, W: np.ndarray) -> float:
        """The Frank-Wolfe gap ``max_V <G, W - V>`` by the dual norm: the reference that runs are held against."""
        return self.support(-G) + float(np.dot(G.ravel(), W.ravel()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, D={self.diameter:.4g})"


def length(name: str, n: int) -> tuple[int]:
    """The shape of a vector set, from its length."""
    return (count(name, n, "the length of the vectors"),)


class L1Ball(Oracle):
    """``{|x|_1 <= delta}`` in n dimensions: ``V = -delta sign(G_i) e_i`` at the largest ``|G_i|``; D = 2 delta."""

    def __init__(self, delta: float, n: int):
        self.delta = positive("delta", delta, "the l1 radius of K")
        self.shape, self.diameter, self.circumradius = length("n", n), 2 * self.delta, self.delta

    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """The signed unit vector at the largest entry; sorting is not needed."""
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

    def start(self) -> np.ndarray:
        """The centre."""
        return np.zeros(self.shape)


class Simplex(Oracle):
    """``{x >= 0, sum x = delta}``: ``V = delta e_i`` at the smallest ``G_i``; ``D = sqrt(2) delta``."""

    def __init__(self, n: int, delta: float = 1.0):
        self.delta = positive("delta", delta, "the sum of the entries")
        self.shape = length("n", n)
        self.diameter = math.sqrt(2) * self.delta if n > 1 else 0.0
        self.circumradius = self.delta * math.sqrt(1 - 1 / n)

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
        self.low, self.high, self.shape = float(low), float(high), length("n", n)
        self.diameter = (self.high - self.low) * math.sqrt(n)
        self.circumradius = self.diameter / 2

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
        """The point of the sphere opposite to the gradient."""
        G = as_array(G)
        size = float(np.linalg.norm(G))
        if size == 0:  # every point is a minimiser; a vertex all the same
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

    def start(self) -> np.ndarray:
        """The centre."""
        return np.zeros(self.shape)


class Product(Oracle):
    """``K_1 x ... x K_L`` over the layers of a network, on the concatenation of the layers' raveled weights.

    The oracle splits: one call per layer. ``D^2`` and ``R^2`` are the sums of the layers' squares; gaps add up.

    Args:
        parts: the sets of the layers, in the order in which the flat vector holds them.
    """

    def __init__(self, parts: Sequence[Oracle]):
        self.parts = tuple(parts)
        if not self.parts:
            raise ValueError("parts must hold at least one set, got none: give one per layer")
        sizes = [math.prod(part.shape) for part in self.parts]
        self.shape = (sum(sizes),)
        ends = np.cumsum(sizes)
        self.slices = [slice(int(end) - size, int(end)) for size, end in zip(sizes, ends)]
        self.diameter = math.sqrt(sum(part.diameter**2 for part in self.parts))
        self.circumradius = math.sqrt(sum(part.circumradius**2 for part in self.parts))
        self.exact = all(part.exact for part in self.parts)

    def split(self, W: np.ndarray) -> list[np.ndarray]:
        """Views of the layers of a flat vector, each in its layer's shape."""
        return [W[cut].reshape(part.shape) for cut, part in zip(self.slices, self.parts)]

    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """One answer per layer; supports add up."""
        answers = [part(block, at=at, rng=rng) for part, block in zip(self.parts, self.split(as_array(G)))]
        V = np.concatenate(
            [np.ravel(a.vertex if isinstance(a.vertex, np.ndarray) else a.vertex.dense()) for a in answers]
        )
        return Answer(V, sum(a.attained for a in answers), sum(a.certified for a in answers))

    def support(self, G: np.ndarray) -> float:
        """The sum of the layers' supports."""
        return sum(part.support(block) for part, block in zip(self.parts, self.split(G)))

    def gauge(self, W: np.ndarray) -> float:
        """The largest of the layers' gauges."""
        return max(part.gauge(block) for part, block in zip(self.parts, self.split(W)))

    def start(self) -> np.ndarray:
        """The layers' starts."""
        return np.concatenate([part.start().ravel() for part in self.parts])
