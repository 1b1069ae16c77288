"""Muon's oracle: the polar factor of the gradient by a few steps of a quintic Newton-Schulz iteration.

Muon (Jordan et al., 2024) replaces the exact polar factor ``U V'``, the vertex of the spectral ball, by five steps of
``X <- a X + (b X X' + c (X X')^2) X`` from ``G / |G|_F``. The iteration maps each singular value by one polynomial and
keeps the singular vectors. It does not converge: singular values of at least 0.002 of ``|G|_F`` end between 0.68 and
1.2025, smaller ones below. So the vertex lies up to a fifth outside the ball, and scaled back it misses the minimum.
"""

from __future__ import annotations

import numpy as np

from theory.arguments import count
from theory.iterates import Gradient, Point, as_array
from theory.oracles.matrices import SpectralBall
from theory.oracles.oracle import Answer

# a, b, c of X <- a X + (b X X' + c (X X')^2) X, as in Muon
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(G: np.ndarray, steps: int = 5) -> np.ndarray:
    """Muon's approximation of the polar factor ``U V'`` of a matrix.

    Args:
        G: (m, n). steps: of the iteration.

    Returns:
        (m, n), with the singular vectors of ``G``; zero for a zero matrix.

    >>> np.linalg.svd(newton_schulz(np.diag([3.0, 1.0])), compute_uv=False).round(2)
    array([1.13, 0.75])
    """
    size = float(np.linalg.norm(G))
    if size == 0:
        return np.zeros_like(G)
    wide = G.shape[0] <= G.shape[1]
    X = (G if wide else G.T) / size
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = X @ X.T
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X if wide else X.T


class NewtonSchulzBall(SpectralBall):
    """The spectral ball ``{sigma_1(W) <= tau}`` with Muon's oracle in place of the exact one.

    Use it as the ``oracle`` of a run on a `SpectralBall`, which then measures the oracle's error. Its vertex keeps a
    fraction of the support ``tau |G|_*``, 0.64 to 0.91 on matrices with Gaussian entries and on spectra ``k^-p``.

    Args:
        tau: the largest singular value allowed. shape: (m, n).
        steps: of the iteration; Muon takes five.
        scaled: divide the vertex by its largest singular value where that is above 1, so that it lies in the ball.
            Muon itself does not.

    Example:
        >>> from theory.iterates import DensePoint
        >>> G, rng = np.diag([3.0, 1.0]), np.random.default_rng(0)
        >>> ball = NewtonSchulzBall(1.0, (2, 2))
        >>> answer = ball(G, at=DensePoint(ball.start()), rng=rng)
        >>> round(answer.attained / answer.certified, 2), round(ball.gauge(answer.vertex), 2)
        (0.75, 1.0)
    """

    def __init__(self, tau: float, shape: tuple[int, int], steps: int = 5, scaled: bool = True):
        super().__init__(tau, shape)
        self.steps, self.scaled, self.exact = count("steps", steps, "the steps of the iteration"), scaled, False

    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """The approximate polar factor, negated and scaled; the support is exact."""
        G = as_array(G)
        X = newton_schulz(G, self.steps)
        if self.scaled:
            X = X / max(1.0, float(np.linalg.norm(X, 2)))
        attained = self.tau * float(np.sum(G * X))
        return Answer(-self.tau * X, attained, max(attained, self.support(G)))
