"""The exact worst case of Theorem 4.1 for a few steps, as a semidefinite program; needs the extra ``pep``.

`worst_average_gap` is the largest average gap over all beta-smooth losses, all sets of diameter D and all starts.
It comes from the performance estimation of Drori and Teboulle (arXiv 1206.3209) with PEPit (arXiv 2201.04040) and
uses nothing of the proof. A bound that agrees with it is tight; one that lies above it is loose by the difference.

At the theorem's step and ``M = beta D^2`` the worst case in units of s is 1.5 for T = 1 and then 1.448, 1.411,
1.389, 1.373, 1.362. So 1.5 cannot be lowered for all T, and 2 is never attained.
"""

from __future__ import annotations

from theory import theorem
from theory.arguments import count, positive


def worst_average_gap(T: int, M: float = 1.0, beta: float = 1.0, D: float = 1.0, factor: float = 1.0) -> float:
    """The largest average gap of T steps of ``factor`` times the theorem's step, in units of s.

    Args:
        T: number of steps; the program grows with it, and 6 is about the limit.
        M: ``L(W_1) - L(W_t) <= M`` for all t, which follows from ``M >= L(W_1) - min L``.
        beta, D: as in the theorem. factor: multiple of the theorem's step.

    Returns:
        The optimal value over ``s = sqrt(M beta) D / sqrt(T)``, to the solver's accuracy of about 1e-5.

    Raises:
        ImportError: PEPit is not installed.
    """
    count("T", T, "the number of steps"), positive("factor", factor, "the multiple of the theorem's step")
    try:
        from PEPit import PEP
        from PEPit.functions import ConvexIndicatorFunction, SmoothFunction
        from PEPit.primitive_steps import linear_optimization_step
    except ImportError as error:
        raise ImportError(f'PEPit is needed ({error}): pip install "chain-of-lora[pep]"') from error
    eta = theorem.theorem_step(M, beta, D, T, factor)
    program = PEP()
    loss = program.declare_function(SmoothFunction, L=beta)
    K = program.declare_function(ConvexIndicatorFunction, D=D)
    W = program.set_initial_point()
    start, gaps = loss(W), []
    K(W)  # W_1 lies in K
    for _ in range(T):
        G = loss.gradient(W)
        V, _, _ = linear_optimization_step(G, K)
        gaps.append(G * (W - V))
        W = (1 - eta) * W + eta * V
        K(W)
        program.set_initial_condition(start - loss(W) <= M)
    program.set_performance_metric(sum(gaps) / T)
    return float(program.solve(verbose=0)) / theorem.scale(M, beta, D, T)
