"""Linear minimisation oracles: a convex compact set ``K`` each, with the vertex that minimises ``<V, G>`` over it."""

from theory.oracles.inexact import AdditiveError, MultiplicativeError
from theory.oracles.matrices import CappedTraceBall, RankBall, SpectralBall, TraceBall
from theory.oracles.vectors import Answer, Box, FrobeniusBall, L1Ball, Oracle, Product, Simplex

__all__ = [
    "AdditiveError",
    "Answer",
    "Box",
    "CappedTraceBall",
    "FrobeniusBall",
    "L1Ball",
    "MultiplicativeError",
    "Oracle",
    "Product",
    "RankBall",
    "Simplex",
    "SpectralBall",
    "TraceBall",
]
