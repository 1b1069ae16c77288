"""The top singular pair of a gradient, with an interval that contains its singular value.

The method is Golub-Kahan-Lanczos bidiagonalisation from a random start. Right vectors are reorthogonalised
in full; one side is enough for accurate Ritz values (Simon and Zha, SIAM J. Sci. Comput. 21, 2000). A step
takes one product with ``A`` and one with its transpose. For a dense ``A`` both go block by block while the
rows are in cache, so a step reads the matrix once.

The Ritz value is attained, ``u'Av = sigma``, so it bounds the top singular value from below. Two bounds hold
from above:

* ``sigma_1^2 <= |A|_F^2 - sum_{i>1} ritz_i^2``, because the i-th Ritz value never exceeds the i-th singular
  value.
* The random start gives the other one. Let ``B = A'A / sigma_1^2`` of order n, and let the start ``b`` be
  uniform on the sphere. With ``p`` the Chebyshev polynomial of degree k-1 on [0, 1-e], a Ritz value below
  ``1-e`` forces ``|b_1| <= 2 sqrt((1-e)/e) exp(-2(k-1) sqrt(e))``, and ``P(|b_1| <= a) <= a sqrt(2n/pi)``.
  Hence the bound fails with probability at most ``2 sqrt(2n/pi) sqrt((1-e)/e) exp(-2(k-1) sqrt(e))``. This
  is the form of Kuczynski and Wozniakowski (SIAM J. Matrix Anal. Appl. 13, 1992); these lines derive the
  constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from theory.arguments import count, fraction
from theory.iterates import Gradient, LowRank, ObservedMatrix, norm, row_blocks

# Above this size the direction in a float64 matrix is sought in float32, which reads half the bytes and is accurate
# enough for a residual of SINGLE_TOL or more. It is then normalised and scored on the float64 matrix.
SINGLE_BYTES, SINGLE_TOL = 1 << 23, 1e-4


@dataclass(frozen=True)
class SingularPairs:
    """The leading Ritz triplets of a matrix, with bounds on its first singular value.

    Attributes:
        u: (m, r) left vectors. sigma: (r,) Ritz values, descending. v: (r, n) right vectors.
        residual: ``|A'u - sigma v|`` of the first triplet.
        upper: certified upper end for ``sigma_1``; the lower end is ``sigma[0]``.
        steps: products with ``A`` (and as many with its transpose).
    """

    u: np.ndarray
    sigma: np.ndarray
    v: np.ndarray
    residual: float
    upper: float
    steps: int

    def scaled(self, weights: np.ndarray | float) -> LowRank:
        """The matrix ``u diag(weights) v``."""
        return LowRank(self.u * weights, self.v)


def random_start_excess(n: int, k: int, failure: float) -> float:
    """The relative error ``e`` of the top Ritz value of ``A'A``, exceeded with probability at most ``failure``.

    Args:
        n: order of ``A'A``. k: number of Lanczos steps. failure: such as 1e-12.

    Returns:
        ``e`` in (0, 1]: with probability at least ``1 - failure``, ``sigma_1^2 <= ritz^2 / (1 - e)``.
    """
    if k < 2:
        return 1.0
    target = math.log(failure) - math.log(2 * math.sqrt(2 * n / math.pi))
    low, high = 0.0, 1.0
    for _ in range(60):  # the bound decreases in e, so bisection finds the crossing
        mid = (low + high) / 2
        log_bound = 0.5 * math.log((1 - mid) / mid) - 2 * (k - 1) * math.sqrt(mid) if mid < 1 else -math.inf
        low, high = (mid, high) if log_bound > target else (low, mid)
    return high


def _single(A: np.ndarray) -> tuple[np.ndarray, float]:
    """A float32 copy and the Frobenius norm, in one pass over the rows."""
    copy, norm2 = np.empty(A.shape, dtype=np.float32), 0.0
    for rows in row_blocks(A):
        block = A[rows]
        norm2 += float(np.dot(block.ravel(), block.ravel()))
        copy[rows] = block
    return copy, math.sqrt(norm2)


def _bidiagonal_step(
    A: Gradient, v: np.ndarray, beta: float, u_previous: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """``p = A v - beta u_previous`` and ``A'p``, in one pass over the rows of a dense matrix."""
    if isinstance(A, ObservedMatrix):
        p = A.by_rows @ v
        if u_previous is not None:
            p -= beta * u_previous
        return p, A.by_columns @ p
    p = np.empty(A.shape[0], dtype=v.dtype)
    q = np.zeros(A.shape[1], dtype=v.dtype)
    for rows in row_blocks(A):
        block = A[rows]
        part = block @ v
        if u_previous is not None:
            part -= beta * u_previous[rows]
        p[rows] = part
        q += part @ block
    return p, q


def _unit(vectors: Any, axis: int) -> Any:
    """Vectors of length one along an axis; zero vectors stay."""
    size = ((vectors * vectors).sum(axis) ** 0.5).reshape((1, -1) if axis == 0 else (-1, 1))
    return vectors / (size + (size == 0))


def top_singular(
    A: Gradient,
    *,
    rng: np.random.Generator,
    rank: int = 1,
    tol: float = 1e-2,
    max_steps: int = 40,
    certify_steps: int = 0,
    failure: float = 1e-12,
) -> SingularPairs:
    """Compute the leading ``rank`` singular triplets of ``A`` by Golub-Kahan-Lanczos from a random start.

    Args:
        A: dense (m, n) array, or an `ObservedMatrix`.
        rng: source of the start vector; the same state gives the same answer, bit for bit on the same machine.
        rank: triplets wanted.
        tol: stop when the residual of every wanted triplet is at most ``tol * sigma_1``.
        max_steps: hard limit on the steps.
        certify_steps: least number of steps; more of them tighten ``upper``.
        failure: allowed probability that ``upper`` is too small.

    Returns:
        `SingularPairs`; for a zero matrix, zero Ritz values and ``upper == 0``.

    Raises:
        ValueError: for a rank above ``min(m, n)``, or a matrix with values that are not finite.
    """
    m, n = A.shape
    rank = count("rank", rank, "the number of singular triplets wanted")
    if rank > min(m, n):
        raise ValueError(f"rank must be at most min(m, n) = {min(m, n)}, got {rank}: lower it")
    fraction("failure", failure, "the allowed probability of a wrong upper end")
    given = A.dtype
    single = isinstance(A, np.ndarray) and given == np.float64 and A.nbytes > SINGLE_BYTES and tol >= SINGLE_TOL
    if single and isinstance(A, np.ndarray):
        exact = A
        A, frobenius = _single(exact)
        if not 1e-20 < frobenius < 1e20:  # float32 would overflow or underflow
            A = exact
    else:
        frobenius = norm(A)
    if not math.isfinite(frobenius):
        raise ValueError(f"A must be finite, got a norm of {frobenius}: the loss has diverged, look at it first")
    limit = min(max(max_steps, certify_steps, rank), n)
    dtype = A.dtype
    # the large arrays live with A; B and its SVD are small and stay on the CPU
    native: Callable[[Any], Any] = A.native if isinstance(A, ObservedMatrix) else partial(np.asarray, dtype=dtype)
    V, U, B = native(np.zeros((limit + 1, n))), native(np.zeros((limit, m))), np.zeros((limit, limit))
    start = rng.standard_normal(n)
    V[0] = native(start / np.linalg.norm(start))
    if frobenius == 0:
        return SingularPairs(native(np.eye(m, rank)), np.zeros(rank), native(np.eye(rank, n)), 0.0, 0.0, 0)
    tiny = np.finfo(dtype).eps * frobenius
    beta, u, k = 0.0, None, 0
    while True:
        p, q = _bidiagonal_step(A, V[k], beta, u)
        alpha = math.sqrt(float(p @ p))
        if alpha > tiny:
            u = p / alpha
            r = q / alpha - alpha * V[k]
        else:  # the Krylov space is exhausted: the row of B is zero
            alpha, u, r = 0.0, 0 * p, 0 * q
        U[k], B[k, k] = u, alpha
        k += 1
        basis = V[:k]
        r -= (basis @ r) @ basis
        r -= (basis @ r) @ basis  # twice is enough
        beta = math.sqrt(float(r @ r))
        left, ritz, right = np.linalg.svd(B[:k, :k])
        exhausted = beta <= tiny or k == n
        done = k >= rank and beta * np.abs(left[-1, :rank]).max() <= tol * ritz[0]
        if k == limit or exhausted or (done and k >= certify_steps):
            break
        V[k] = r / beta
        B[k - 1, k] = beta
    wanted = min(rank, k)
    sigma = np.zeros(rank)
    sigma[:wanted] = ritz[:wanted]
    # beyond the rank of the Krylov space, singular values and vectors are zero
    to_left, to_right = np.zeros((k, rank)), np.zeros((rank, k))
    to_left[:, :wanted], to_right[:wanted] = left[:, :wanted], right[:wanted]
    u_out, v_out = U[:k].T @ native(to_left), native(to_right) @ V[:k]
    if A.dtype != given:
        u_out, v_out = u_out.astype(given), v_out.astype(given)
    # a vertex must have norm one to lie in K, and left vectors and float32 have lost digits
    u_out, v_out = _unit(u_out, 0), _unit(v_out, 1)
    # rounding to float32 moves a singular value by at most half its unit times the Frobenius norm
    slack = 8 * np.finfo(dtype).eps * frobenius
    bounds = [math.sqrt(max(frobenius**2 - float(np.sum(ritz[1:] ** 2)), ritz[0] ** 2))]
    if exhausted:  # with probability one the Krylov space holds the top singular vector
        bounds.append(float(ritz[0]))
    else:
        excess = random_start_excess(n, k, failure)
        if excess < 1:
            bounds.append(float(ritz[0]) / math.sqrt(1 - excess))
    return SingularPairs(u_out, sigma, v_out, beta * abs(float(left[-1, 0])), min(bounds) + slack, k)
