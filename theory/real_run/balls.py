"""The ball K of one layer in a real run, for any gradient whose leading singular values are known.

The three families are those of `theory.oracles.matrices`: ``"rank"`` is `RankBall` (rank 1: the trace ball),
``"capped"`` is `CappedTraceBall`, and ``"spectral"`` is `SpectralBall`, the ball of Muon. All depend on singular values
alone, so the gap needs no gradient of full size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from theory.arguments import count
from theory.oracles.matrices import support_norm

NAMES = ("rank", "capped", "spectral")


@dataclass(frozen=True)
class Ball:
    """A ball of radius 1 in each layer.

    Args:
        name: ``"rank"``, ``"capped"`` or ``"spectral"``. rank: r of the first two; the third has none.

    Raises:
        ValueError: the name is unknown, or the rank below 1.

    >>> float(Ball("capped", 2).gauge(np.array([1.0, 1.0, 0.0])))
    1.0
    """

    name: str = "rank"
    rank: int = 1

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"ball must be one of {', '.join(NAMES)}, got {self.name!r}: pick one of them")
        count("rank", self.rank, "the rank of the atoms of K")

    def kept(self, values: int) -> int:
        """How many of the leading singular values the support needs."""
        return values if self.name == "spectral" else min(self.rank, values)

    def support(self, sigma: np.ndarray, residual: float, side: int) -> tuple[float, float]:
        """The interval for the support, the largest ``<G, V>`` over the ball.

        Args:
            sigma: descending singular values of ``Q'G``, at least `kept` of them.
            residual: bound on ``|(I - QQ')G|`` in the spectral norm: ``sigma_i(G)^2 <= sigma_i^2 + residual^2``.
            side: the number of singular values of G, the smaller side of the layer.
        """
        sigma = np.asarray(sigma, dtype=float)[: self.kept(side)]
        most = np.sqrt(sigma**2 + residual**2)
        rounding = 1 + 64 * float(np.finfo(np.float32).eps)
        if self.name == "rank":
            return float(np.linalg.norm(sigma)), math.sqrt(float(sigma @ sigma) + self.rank * residual**2) * rounding
        # values that the sketch did not find are at most the residual
        missing = max(0, self.kept(side) - sigma.size)
        unseen = missing * residual if missing else 0.0
        return float(sigma.sum()), (float(most.sum()) + unseen) * rounding

    def gauge(self, sigma: np.ndarray) -> float:
        """The size of a matrix with these singular values (descending) in units of the ball."""
        if self.name == "rank":
            return support_norm(sigma, self.rank)
        largest = float(sigma[0])
        return largest if self.name == "spectral" else max(largest, float(np.sum(sigma)) / self.rank)

    def diameter(self, side: int) -> float:
        """``D`` of the ball of radius 1 in a layer whose smaller side is ``side``."""
        return 2.0 if self.name == "rank" else 2 * math.sqrt(self.kept(side))

    def vertex_values(self, sigma: Tensor) -> Tensor:
        """The singular values of the best vertex for a gradient with these ones; the vertex has its vectors."""
        kept = self.kept(len(sigma))
        values = torch.zeros_like(sigma)
        if self.name != "rank":
            values[:kept] = 1.0
            return values
        size = sigma[:kept].norm()
        if size > 0:
            values[:kept] = sigma[:kept] / size
        else:
            values[0] = 1.0
        return values
