"""Sets of matrices: the trace-norm ball of Theorem 4.1, the spectral ball, and two balls with rank-r vertices.

The vertices of the trace ball have rank one, those of the rank-r balls rank r, like the links of a chain of
LoRA. This is the bridge from Algorithm 1 to Algorithm 2.
"""

from __future__ import annotations

import math

import numpy as np

from theory.arguments import count, matrix_shape, positive
from theory.iterates import Gradient, Point, as_array, inner
from theory.oracles.lanczos import SingularPairs, top_singular
from theory.oracles.oracle import Answer, Oracle

# Up to this many rows or columns a full SVD costs no more than Lanczos, and it is exact.
DENSE_LIMIT = 64


class _SingularOracle(Oracle):
    """A set whose vertices are built from leading singular pairs of the gradient.

    Args:
        shape: (m, n) of the matrices.
        method: ``"svd"`` (exact), ``"lanczos"``, or ``"auto"``: a full SVD up to 64 rows or columns.
        tol: relative residual at which Lanczos stops.
        certify_steps: least number of Lanczos steps; more of them tighten the interval.
    """

    def __init__(self, shape: tuple[int, int], method: str, tol: float, certify_steps: int):
        self.shape = matrix_shape("shape", shape)
        if method not in ("auto", "svd", "lanczos"):
            raise ValueError(f'method must be "auto", "svd" or "lanczos", got {method!r}: pick one of them')
        self.method = ("svd" if min(shape) <= DENSE_LIMIT else "lanczos") if method == "auto" else method
        self.tol = positive("tol", tol, "the relative residual at which Lanczos stops, such as 1e-2")
        self.certify_steps = count("certify_steps", certify_steps, "a number of Lanczos steps", least=0)
        self.exact = self.method == "svd"

    def _leading(self, G: Gradient, rank: int, rng: np.random.Generator) -> SingularPairs:
        """The leading pairs of ``G``, exactly for ``method="svd"``."""
        if self.method == "lanczos":
            return top_singular(G, rng=rng, rank=rank, tol=self.tol, certify_steps=self.certify_steps)
        u, sigma, v = np.linalg.svd(as_array(G), full_matrices=False)
        return SingularPairs(u[:, :rank], sigma[:rank], v[:rank], 0.0, float(sigma[0]), 0)


class TraceBall(_SingularOracle):
    """``{|W|_* <= delta}``: ``V = -delta u_1 v_1'`` with the top singular pair of ``G``; ``D = 2 delta``.

    The gap of Theorem 4.1 on this set is ``delta sigma_1(G) + <G, W>``. With ``method="lanczos"`` the answer
    is an interval: ``attained <= delta sigma_1(G) <= certified``.

    Args:
        delta: the trace-norm (nuclear-norm) radius.
        shape: (m, n).
        method, tol, certify_steps: how to find the singular pair; see `theory.oracles.lanczos`.

    Example:
        >>> ball = TraceBall(2.0, (3, 2))
        >>> ball.diameter, ball.support(np.diag([3.0, 1.0, 0.0])[:, :2])
        (4.0, 6.0)
    """

    def __init__(
        self,
        delta: float,
        shape: tuple[int, int],
        method: str = "auto",
        tol: float = 1e-2,
        certify_steps: int = 0,
    ):
        super().__init__(shape, method, tol, certify_steps)
        self.delta = positive("delta", delta, "the trace-norm radius of K")
        self.diameter, self.circumradius = 2 * self.delta, self.delta

    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """A rank-one vertex from the top singular pair."""
        pairs = self._leading(G, 1, rng)
        V = pairs.scaled(-self.delta)
        attained = self.delta * float(pairs.sigma[0]) if self.exact else -inner(G, V)
        return Answer(V, attained, max(attained, self.delta * pairs.upper))

    def support(self, G: np.ndarray) -> float:
        """``delta sigma_1(G)``, from the singular values alone."""
        return self.delta * float(np.linalg.norm(G, 2))

    def gauge(self, W: np.ndarray) -> float:
        """``|W|_* / delta``."""
        return float(np.linalg.norm(W, "nuc")) / self.delta


class SpectralBall(_SingularOracle):
    """``{sigma_1(W) <= tau}``: ``V = -tau U V'``, the polar factor; ``D = 2 tau sqrt(min(m, n))``."""

    def __init__(self, tau: float, shape: tuple[int, int]):
        super().__init__(shape, "svd", 1.0, 0)
        self.tau = positive("tau", tau, "the largest singular value allowed")
        self.circumradius = self.tau * math.sqrt(min(self.shape))
        self.diameter = 2 * self.circumradius

    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """The polar factor, negated and scaled."""
        u, sigma, v = np.linalg.svd(as_array(G), full_matrices=False)
        value = self.tau * float(sigma.sum())
        return Answer(-self.tau * (u @ v), value, value)

    def support(self, G: np.ndarray) -> float:
        """``tau |G|_*``."""
        return self.tau * float(np.linalg.norm(G, "nuc"))

    def gauge(self, W: np.ndarray) -> float:
        """``sigma_1(W) / tau``."""
        return float(np.linalg.norm(W, 2)) / self.tau


class RankBall(_SingularOracle):
    """``conv{rank W <= r, |W|_F <= delta}``: ``V = -delta G_r / |G_r|_F``, ``G_r`` of the best rank r; ``D = 2 delta``.

    Its vertices are links of rank r and bounded Frobenius norm. ``r = 1`` is the trace ball and
    ``r = min(m, n)`` the Frobenius ball. The gap is ``delta (sum_{i<=r} sigma_i^2)^(1/2) + <G, W>``.
    """

    def __init__(self, delta: float, rank: int, shape: tuple[int, int]):
        super().__init__(shape, "svd", 1.0, 0)
        self.delta = positive("delta", delta, "the Frobenius radius of the rank-r atoms")
        self.rank = _rank(rank, shape)
        self.diameter, self.circumradius = 2 * self.delta, self.delta

    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """The best rank-r part, negated and scaled to the radius."""
        pairs = self._leading(G, self.rank, rng)
        size = float(np.linalg.norm(pairs.sigma))
        weights = pairs.sigma / size if size > 0 else np.eye(1, self.rank)[0]
        return Answer(pairs.scaled(-self.delta * weights), self.delta * size, self.delta * size)

    def support(self, G: np.ndarray) -> float:
        """``delta (sum_{i<=r} sigma_i^2)^(1/2)``, from the eigenvalues of the Gram matrix."""
        gram = G.T @ G if G.shape[0] >= G.shape[1] else G @ G.T
        return self.delta * math.sqrt(max(0.0, float(np.linalg.eigvalsh(gram)[-self.rank :].sum())))

    def gauge(self, W: np.ndarray) -> float:
        """The r-support norm of the singular values over ``delta`` (Argyriou, Foygel, Srebro, arXiv 1204.5043)."""
        return support_norm(np.linalg.svd(W, compute_uv=False), self.rank) / self.delta


def support_norm(sigma: np.ndarray, r: int) -> float:
    """The r-support norm of singular values in descending order; its unit ball is that of `RankBall`.

    ``r = 1`` gives the sum (the trace norm), ``r = len(sigma)`` the Euclidean norm.
    """
    sigma = np.asarray(sigma, dtype=float)
    r = min(r, sigma.size)
    for spread in range(r):  # the head keeps its values; spread + 1 of the r places share the tail
        head, tail = sigma[: r - spread - 1], float(sigma[r - spread - 1 :].sum()) / (spread + 1)
        if (head.size == 0 or head[-1] > tail) and tail >= sigma[r - spread - 1]:
            break
    return math.sqrt(float(np.sum(head**2)) + (spread + 1) * tail**2)


class CappedTraceBall(_SingularOracle):
    """``{sigma_1(W) <= tau, |W|_* <= r tau}``: ``V = -tau U_r V_r'``; ``D = 2 tau sqrt(r)``.

    Its vertices have rank r too, with r directions of equal length. The gap is
    ``tau sum_{i<=r} sigma_i + <G, W>``.
    """

    def __init__(self, tau: float, rank: int, shape: tuple[int, int]):
        super().__init__(shape, "svd", 1.0, 0)
        self.tau = positive("tau", tau, "the largest singular value allowed")
        self.rank = _rank(rank, shape)
        self.circumradius = self.tau * math.sqrt(self.rank)
        self.diameter = 2 * self.circumradius

    def __call__(self, G: Gradient, *, at: Point, rng: np.random.Generator) -> Answer:
        """The leading r directions, all of length ``tau``."""
        pairs = self._leading(G, self.rank, rng)
        value = self.tau * float(pairs.sigma.sum())
        return Answer(pairs.scaled(np.full(self.rank, -self.tau)), value, value)

    def support(self, G: np.ndarray) -> float:
        """``tau sum_{i<=r} sigma_i``, tau times the Ky Fan norm."""
        return self.tau * float(np.linalg.svd(G, compute_uv=False)[: self.rank].sum())

    def gauge(self, W: np.ndarray) -> float:
        """The larger of ``sigma_1 / tau`` and ``|W|_* / (r tau)``."""
        sigma = np.linalg.svd(W, compute_uv=False)
        return max(float(sigma[0]), float(sigma.sum()) / self.rank) / self.tau


def _rank(rank: int, shape: tuple[int, int]) -> int:
    rank = count("rank", rank, "the rank r of the atoms")
    if rank > min(shape):
        raise ValueError(f"rank must be at most min(m, n) = {min(shape)}, got {rank}: lower it")
    return rank
