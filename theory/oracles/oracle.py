"""The interface of an oracle: for a gradient ``G`` it returns the vertex of ``K`` that minimises ``<V, G>``.

An oracle is its set ``K``. It knows the diameter ``D`` and the circumradius ``R`` in the Frobenius norm,
and how far a point lies outside. It also evaluates the support function by its dual norm, on a route that
shares nothing with the call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from theory.iterates import Gradient, Point, Vertex


@dataclass(frozen=True)
class Answer:
    """The answer of an oracle to a gradient ``G``.

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
        diameter: ``D = max |V - W|_F`` over ``K``.
        circumradius: ``R``, the radius of the smallest ball around ``K``.
        centre: of that ball; None for the origin.
        epsilon: the additive error ``eps`` that the oracle admits to; 0 unless it errs on purpose.
        rho: the fraction of the gap that its vertices keep at least; 1 unless it errs on purpose.
        exact: whether ``attained == certified`` always.
    """

    shape: tuple[int, ...]
    diameter: float
    circumradius: float
    centre: np.ndarray | None = None
    epsilon: float = 0.0
    rho: float = 1.0
    exact: bool = True

    @abstractmethod
    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """Minimise ``<V, G>`` over ``K``.

        Args:
            G: a gradient of this set's shape. at: the iterate, used only by oracles that err on purpose.
            rng: source of all randomness.
        """

    @abstractmethod
    def support(self, G: np.ndarray) -> float:
        """The exact support ``max_{V in K} <G, V>`` of a dense array, by the dual norm."""

    @abstractmethod
    def gauge(self, W: np.ndarray) -> float:
        """The size of ``W`` in units of ``K``: at most 1 inside, above 1 by the relative excess outside."""

    def start(self) -> np.ndarray:
        """A natural starting point of ``K``; zero, the centre of a norm ball, unless overridden."""
        return np.zeros(self.shape)

    def gap(self, G: np.ndarray, W: np.ndarray) -> float:
        """The Frank-Wolfe gap ``max_V <G, W - V>`` by the dual norm, as a reference for runs."""
        return self.support(-G) + float(np.dot(G.ravel(), W.ravel()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, D={self.diameter:.4g})"
