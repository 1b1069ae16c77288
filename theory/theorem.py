"""Theorem 4.1 and the bounds around it, as functions of ``M, beta, D, T``.

The symbols of this package: ``L`` is the loss and ``beta`` its smoothness on ``K``; ``D`` is the diameter and
``R`` the circumradius of ``K``; ``g_t = max_{V in K} <grad L(W_t), W_t - V>`` is the Frank-Wolfe gap; ``eps_t``
is the oracle's error; ``h_1 = L(W_1) - min_K L <= M``; ``eta = sqrt(M) / (D sqrt(beta T))`` is the step; and
``s = sqrt(M beta) D / sqrt(T)`` is the scale of the bound. `theory/README.md` has the proofs and three
corrections to the paper.
"""

from __future__ import annotations

import math

from theory.arguments import count, positive

# as the paper prints it, from h_1 <= M, and from |L| <= M alone
PAPER, FROM_SUBOPTIMALITY, FROM_MAGNITUDE = 2.0, 1.5, 2.5


def theorem_step(M: float, beta: float, D: float, T: int, factor: float = 1.0) -> float:
    """The step of Theorem 4.1, ``eta = factor sqrt(M) / (D sqrt(beta T))``, clipped to 1.

    Args:
        M: upper bound of ``L(W_1) - min L``. beta: smoothness. D: diameter. T: number of steps.
        factor: 1 for the theorem; sqrt(2) is best for general sets, sqrt(8) for norm balls.

    Example:
        >>> theorem_step(M=1.0, beta=4.0, D=1.0, T=100)
        0.05
    """
    positive("M", M, "a bound on L(W_1) - min L"), positive("beta", beta, "the smoothness of L on K")
    positive("D", D, "the diameter of K"), count("T", T, "the number of steps")
    return min(1.0, factor * math.sqrt(M / (beta * T)) / D)


def scale(M: float, beta: float, D: float, T: int) -> float:
    """The scale of the bound, ``s = sqrt(M beta) D / sqrt(T)``."""
    return math.sqrt(M * beta / T) * D


def constant_step_bound(M: float, beta: float, D: float, T: int, eta: float) -> float:
    """``avg (g - eps) <= M / (eta T) + eta beta D^2 / 2`` for any constant step; ``1.5 s`` at the theorem's."""
    return M / (eta * T) + eta * beta * D**2 / 2


def two_sided(drop: float, M: float, beta: float, D: float, T: int, eta: float) -> tuple[float, float]:
    """The interval that contains ``avg (g - eps)``, given the measured drop ``L_1 - L_{T+1}``.

    It is ``drop / (eta T) -+ eta beta D^2 / 2``; at the theorem's step ``s (drop / M -+ 1/2)``. For a drop
    above ``M / 2`` the lower end is positive, so the average gap is of order ``1/sqrt(T)`` and not only bounded
    by it.
    """
    centre, half = drop / (eta * T), eta * beta * D**2 / 2
    return centre - half, centre + half


def sharp_bound(drop: float, beta: float, R: float, T: int, eta: float) -> float:
    """``avg (g - eps) <= drop / (eta T) + beta eta R^2 (1 + 1/(eta T)) / (2 (1 - eta))``; infinite at eta = 1.

    For norm balls (``R = D/2``) the constant tends to 1.125 at the theorem's step and to 0.707 at sqrt(8) times
    that step.
    """
    if eta >= 1:
        return math.inf
    return drop / (eta * T) + beta * eta * R**2 * (1 + 1 / (eta * T)) / (2 * (1 - eta))


def weighted_bound(M: float, beta: float, D: float, sum_eta: float, sum_eta2: float) -> float:
    """``sum eta_t (g_t - eps_t) / sum eta_t <= (M + beta D^2 sum eta_t^2 / 2) / sum eta_t``, for any steps."""
    return (M + beta * D**2 * sum_eta2 / 2) / sum_eta


def short_step_bound(h1: float, beta: float, D: float, T: int) -> float:
    """``min_t g_t <= max(2 h_1, beta D^2) / sqrt(T)`` for the short step (Lacoste-Julien, arXiv 1607.00345).

    With ``C = beta D^2`` each step gains ``min(g^2 / (2C), g - C/2)``. If the smallest gap is at most C, T gains
    of the first kind give ``g <= sqrt(2 h_1 C / T)``. Otherwise T gains of the second kind give ``C/2 < h_1/T``
    and ``g < 2 h_1 / T``.
    """
    return max(2 * h1, beta * D**2) / math.sqrt(T)


def shortest_telling_run(M: float, beta: float, D: float, g1: float, constant: float = FROM_SUBOPTIMALITY) -> int:
    """The least T at which ``constant * s < g_1``; below it the bound says less than the first gap."""
    return math.floor(M * beta * (constant * D / g1) ** 2) + 1


def stochastic_error(D: float, sigma: float, batch: int, operator_noise: float | None = None) -> float:
    """The expected oracle error that a noisy gradient adds: ``min(D sigma / sqrt(b), 2 delta E|xi|_op)``.

    Args:
        D: diameter. sigma: ``sqrt(E|xi|_F^2)`` of one sample. batch: ``b``.
        operator_noise: for the trace ball, ``E|xi|_op`` of the averaged noise; ``2 delta = D`` there.
    """
    frobenius = D * sigma / math.sqrt(batch)
    return frobenius if operator_noise is None else min(frobenius, D * operator_noise)


def sufficient_batch(sigma: float, M: float, beta: float, T: int) -> int:
    """The batch ``b >= sigma^2 T / (M beta)`` at which the noise costs at most one more ``s``."""
    return math.ceil(sigma**2 * T / (M * beta))
