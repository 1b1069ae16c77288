"""Oracles that err on purpose, by exactly as much as they admit to.

Theorem 4.1 allows an additive error ``eps``: ``<V, G> <= min_V <V, G> + eps``. An oracle with a
multiplicative error keeps a fraction ``rho`` of the gap, ``<G, W - V> >= rho g``; it divides the bound by
``rho`` and leaves no floor. There are two adversaries: *away* spends the error on a move towards the worst
vertex, *stall* on staying where the iterate is.
"""

from __future__ import annotations

import numpy as np

from theory.arguments import fraction, nonnegative
from theory.iterates import DensePoint, Gradient, ObservedMatrix, Point, as_array
from theory.oracles.oracle import Answer, Oracle

ADVERSARIES = ("away", "stall")


class _Inexact(Oracle):
    """Wraps an exact oracle and returns a vertex that is worse than the best by a chosen amount."""

    def __init__(self, oracle: Oracle, adversary: str):
        if not oracle.exact:
            raise ValueError(f"oracle must be exact, got {oracle!r}: an error can only be planted over a known minimum")
        if adversary not in ADVERSARIES:
            raise ValueError(f'adversary must be "away" or "stall", got {adversary!r}: pick one of them')
        self.oracle, self.adversary = oracle, adversary
        self.shape, self.diameter, self.circumradius = oracle.shape, oracle.diameter, oracle.circumradius
        self.centre = oracle.centre
        self.exact = True

    def _worse(self, G: Gradient, at: Point, rng: np.random.Generator, best: Answer, error: float) -> Answer:
        """Move the best vertex towards the adversary's target until it has lost ``error``."""
        if isinstance(G, ObservedMatrix) or not isinstance(at, DensePoint):
            raise ValueError(f"G must be a dense array, got {type(G).__name__}: errors are planted in dense points")
        V = as_array(best.vertex)
        if self.adversary == "away":
            opposite = self.oracle(-G, at=at, rng=rng)
            target, room = as_array(opposite.vertex), best.attained + opposite.attained
        else:
            target, room = at.array, best.attained + at.inner(G)
        share = min(1.0, error / room) if room > 0 else 0.0
        return Answer(V + share * (target - V), best.attained - share * room, best.attained)

    def support(self, G: np.ndarray) -> float:
        """The exact support: the error does not change ``K``."""
        return self.oracle.support(G)

    def gauge(self, W: np.ndarray) -> float:
        """The gauge of the set."""
        return self.oracle.gauge(W)

    def start(self) -> np.ndarray:
        """The start of the set."""
        return self.oracle.start()


class AdditiveError(_Inexact):
    """The oracle of Theorem 4.1: it misses the minimum by ``epsilon``, or by the width of ``K`` if that is smaller.

    Args:
        oracle: an exact one. epsilon: ``eps >= 0``. adversary: ``"away"`` or ``"stall"``.
    """

    def __init__(self, oracle: Oracle, epsilon: float, adversary: str = "away"):
        super().__init__(oracle, adversary)
        self.epsilon = nonnegative("epsilon", epsilon, "the additive error of the oracle")

    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """A vertex that misses the minimum by ``epsilon``."""
        return self._worse(G, at, rng, self.oracle(G, at=at, rng=rng), self.epsilon)


class MultiplicativeError(_Inexact):
    """Keeps exactly the fraction ``rho`` of the gap: ``<G, W - V> = rho g``.

    Args:
        oracle: an exact one. rho: in (0, 1]. adversary: ``"away"`` or ``"stall"``.
    """

    def __init__(self, oracle: Oracle, rho: float, adversary: str = "away"):
        super().__init__(oracle, adversary)
        self.rho = fraction("rho", rho, "the fraction of the gap that the oracle keeps")

    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """A vertex that keeps ``rho`` of the gap at ``at``."""
        best = self.oracle(G, at=at, rng=rng)
        gap = best.attained + at.inner(G)
        return self._worse(G, at, rng, best, max(0.0, (1 - self.rho) * gap))
