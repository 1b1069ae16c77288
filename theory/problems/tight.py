"""Instances that nearly attain the bound of Theorem 4.1, so that a check of the bound says something.

On ``A``, ``B``, ``B2`` and ``F`` the gap is of order ``1/sqrt(T)`` because of the constant step. Only ``G`` resists
the short step too. The last two functions break the paper's constant if ``M`` bounds ``|L|`` alone.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr

from theory.arguments import count, positive
from theory.oracles import Box, FrobeniusBall, Simplex, TraceBall
from theory.problems.problem import DenseProblem
from theory.seeds import generator


def cosine(M: float = 1.0) -> DenseProblem:
    """Instance A: ``L(x) = (M/2)(1 - cos 4x)`` on [-1, 1] from ``pi/4 - 1e-3``, next to the maximum; non-convex.

    ``L'' = 8 M cos 4x``, so ``beta = 8 M``. L takes values in [0, M]. The average gap is 1.1235 s at T = 1e5.
    """
    M = positive("M", M, "the height of the wave")
    return DenseProblem(
        "A: cosine",
        Box(-1.0, 1.0),
        lambda x: M / 2 * (1 - math.cos(4 * x[0])),
        lambda x: np.array([2 * M * math.sin(4 * x[0])]),
        beta=8 * M,
        M=M,
        start=np.array([math.pi / 4 - 1e-3]),
    )


def cosine_ray(m: int = 6, n: int = 4, M: float = 1.0, seed: int = 0) -> DenseProblem:
    """Instance A lifted to the trace ball: ``L(W) = (M/2)(1 - cos 4 <A, W>)`` with ``A = a b'`` of norm 1.

    On the ball of radius 1, ``<A, W>`` takes values in [-1, 1]. Smoothness and diameter are those of `cosine`.
    """
    M = positive("M", M, "the height of the wave")
    rng = generator(seed)
    a, b = rng.standard_normal(m), rng.standard_normal(n)
    A = np.outer(a / np.linalg.norm(a), b / np.linalg.norm(b))
    return DenseProblem(
        "A-ray: cosine on the trace ball",
        TraceBall(1.0, (m, n)),
        lambda W: M / 2 * (1 - math.cos(4 * float(np.sum(A * W)))),
        lambda W: 2 * M * math.sin(4 * float(np.sum(A * W))) * A,
        beta=8 * M,
        M=M,
        start=(math.pi / 4 - 1e-3) * A,
    )


def simplex_quadratic(n: int = 400) -> DenseProblem:
    """Instance B: ``|x - 1/n|^2 / 2`` on the simplex from a vertex; ``beta = 1``, ``M = h_1 = (1 - 1/n)/2``.

    The steps cycle through the vertices for ever. The average gap is 1.251 s.
    """
    return DenseProblem(
        "B: simplex",
        Simplex(n),
        lambda x: float(np.dot(x - 1 / n, x - 1 / n)) / 2,
        lambda x: x - 1 / n,
        beta=1.0,
        M=(1 - 1 / n) / 2,
    )


def simplex_well(n: int = 400, width: float = 0.35) -> DenseProblem:
    """Instance B2: the Gaussian well ``1 - exp(-|x - 1/n|^2 / (2 width^2))`` on the same set; non-convex.

    Its Hessian has eigenvalues in ``[-2 exp(-3/2), 1] / width^2``, so ``beta = 1 / width^2``. L lies in [0, 1), so
    ``M = 1``. The average gap is 1.221 s.
    """
    a = 1 / (2 * positive("width", width, "the width of the well") ** 2)

    def depth(x: np.ndarray) -> float:
        return math.exp(-a * float(np.dot(x - 1 / n, x - 1 / n)))

    return DenseProblem(
        "B2: Gaussian well on the simplex",
        Simplex(n),
        lambda x: 1 - depth(x),
        lambda x: 2 * a * depth(x) * (x - 1 / n),
        beta=2 * a,
        M=1.0,
        magnitude=1.0,
    )


def trace_quadratic(n: int = 20, seed: int | None = None) -> DenseProblem:
    """Instance F: ``|W - C|^2 / 2`` on the trace ball of radius 1, ``C = 1.5 I/n``, from ``e_1 e_1'``.

    The optimum ``I/n`` lies on the boundary, so a gap with the paper's sign does not tend to zero. ``beta = 1``,
    and ``M = h_1`` is the loss at the start less ``1/(8n)`` at the optimum. The average gap is 1.126 s.

    Args:
        n: order of the matrices. seed: of a random start ``u v'``; None starts from ``e_1 e_1'``.
    """
    n = count("n", n, "the order of the matrices", least=2)
    C = 1.5 / n * np.eye(n)
    W1 = np.zeros((n, n))
    W1[0, 0] = 1.0
    if seed is not None:
        u, v = generator(seed).standard_normal((2, n))
        W1 = np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))
    return DenseProblem(
        "F: trace ball",
        TraceBall(1.0, (n, n)),
        lambda W: float(np.sum((W - C) ** 2)) / 2,
        lambda W: W - C,
        beta=1.0,
        M=float(np.sum((W1 - C) ** 2)) / 2 - 1 / (8 * n),
        start=W1,
        magnitude=1.0,
    )


def _bump(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``Psi(x) = exp(1 - 1/(2x-1)^2)`` above 1/2, else 0, and its derivative."""
    z = np.where(x > 0.5, 2 * x - 1, 1.0)
    psi = np.where(x > 0.5, np.exp(1 - 1 / z**2), 0.0)
    return psi, psi * 4 / z**3


def _ramp(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``Phi(x) = sqrt(e) int_{-inf}^x exp(-t^2/2) dt`` and its derivative."""
    return math.sqrt(2 * math.pi * math.e) * ndtr(x), np.exp(0.5 - x**2 / 2)


def zero_chain(n: int) -> DenseProblem:
    """Instance G: the zero-chain of Carmon et al. (arXiv 1710.11606) from 0 on the l2 ball of radius 3 sqrt(n).

    ``L(x) = -Psi(1) Phi(x_1) + sum_{i>1} Psi(-x_{i-1}) Phi(-x_i) - Psi(x_{i-1}) Phi(x_i)``. A method that combines
    gradients finds one new coordinate per step, so n = T steps never reach the end. As ``Phi < sqrt(2 pi e)`` and
    ``Psi < e``, ``L(0) - inf L <= 12 n = M``. The rows of the tridiagonal Hessian sum to at most
    ``sup Psi'' sup Phi + sup Psi sup Phi'' + 2 sup Psi' sup Phi' < 152 = beta``.
    """
    n = count("n", n, "the length of the chain; take it equal to T")

    def parts(x: np.ndarray) -> tuple[np.ndarray, ...]:
        before = np.concatenate([[1.0], x[:-1]])
        (psi_n, dpsi_n), (psi, dpsi) = _bump(-before), _bump(before)
        (phi_n, dphi_n), (phi, dphi) = _ramp(-x), _ramp(x)
        return psi_n, dpsi_n, psi, dpsi, phi_n, dphi_n, phi, dphi

    def value(x: np.ndarray) -> float:
        psi_n, _, psi, _, phi_n, _, phi, _ = parts(x)
        return float(np.sum(psi_n * phi_n - psi * phi))

    def gradient(x: np.ndarray) -> np.ndarray:
        psi_n, dpsi_n, psi, dpsi, phi_n, dphi_n, phi, dphi = parts(x)
        G = -psi_n * dphi_n - psi * dphi
        G[:-1] += (-dpsi_n * phi_n - dpsi * phi)[1:]
        return G

    return DenseProblem(
        f"G: zero-chain of {n}",
        FrobeniusBall(3 * math.sqrt(n), (n,)),
        value,
        gradient,
        beta=152.0,
        M=12.0 * n,
        magnitude=12.0 * n,
    )


def magnitude_counterexample(M: float = 1.0, lifted: bool = False) -> DenseProblem:
    """``L = -M cos 4x`` on [-1, 1]: ``|L| <= M`` holds, yet the average gap is 2.12 s, above the paper's 2.

    The problem's ``M`` bounds ``|L|``, as the paper's proof assumes, while ``L(W_1) - min L`` is ``2 M``.

    Args:
        lifted: whether to use a ray of the trace ball instead of the interval.
    """
    twin = cosine_ray(M=2 * M) if lifted else cosine(M=2 * M)
    return DenseProblem(
        "|L| <= M: cosine" + (" on the trace ball" if lifted else ""),
        twin.oracle,
        lambda x: twin._value(x) - M,
        twin._gradient,
        beta=16 * M,
        M=M,
        start=twin._start,
    )


def one_step_worst_case(constant: float = 2.5, M: float = 1.0, D: float = 1.0) -> DenseProblem:
    """``L = -c M x / D + beta x^2 / 2`` on [0, D] with ``beta = M / D^2``: at T = 1 the gap is exactly ``c s``.

    With ``c = 1.5``, ``L(W_1) - min L = M``; with ``c = 2.5``, ``|M + L| <= M``. So both constants are attained.
    """
    positive("constant", constant, "the constant to attain")
    beta = M / D**2
    return DenseProblem(
        f"one step, constant {constant:g}",
        Box(0.0, D),
        lambda x: -constant * M * x[0] / D + beta * x[0] ** 2 / 2,
        lambda x: np.array([-constant * M / D + beta * x[0]]),
        beta=beta,
        M=M,
        start=np.zeros(1),
    )
