"""Linear minimisation oracles, one class per set ``K``: each returns the vertex that minimises ``<V, G>``."""

from theory.oracles.inexact import AdditiveError, MultiplicativeError
from theory.oracles.matrices import CappedTraceBall, RankBall, SpectralBall, TraceBall
from theory.oracles.newton_schulz import NewtonSchulzBall
from theory.oracles.oracle import Answer, Oracle
from theory.oracles.product import Product
from theory.oracles.vectors import Box, FrobeniusBall, L1Ball, Simplex

__all__ = [
    "AdditiveError",
    "Answer",
    "Box",
    "CappedTraceBall",
    "FrobeniusBall",
    "L1Ball",
    "MultiplicativeError",
    "NewtonSchulzBall",
    "Oracle",
    "Product",
    "RankBall",
    "Simplex",
    "SpectralBall",
    "TraceBall",
]
