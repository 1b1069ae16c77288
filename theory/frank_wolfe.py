"""Algorithm 2, idealised COLA: stochastic non-convex Frank-Wolfe with an inexact oracle, measured as it runs.

    G_t = an estimate of grad L(W_t)
    V_t = oracle(G_t)                      <V_t, G_t> <= min_{V in K} <V, G_t> + eps
    W_{t+1} = W_t + eta (V_t - W_t)

One iteration is one link of a chain: ``eta (V_t - W_t)`` is what training a fresh adapter adds to the
weights. The loop records what the checks need and judges nothing: see `theory.checks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from theory import theorem
from theory.arguments import count
from theory.gradient_estimators import Estimator, FullGradient
from theory.iterates import Gradient, Point, Vertex, inner, norm
from theory.oracles import Oracle
from theory.problems import Problem
from theory.seeds import generator
from theory.step_sizes import Constants, Situation, Step, TheoremStep


@dataclass(eq=False)
class Run:
    """The record of T iterations; arrays are indexed by t - 1.

    Attributes:
        value: (T+1,) the losses ``L(W_1) .. L(W_{T+1})``.
        gap: (T,) ``g_t``, exact where the set's oracle is, else its certified lower end.
        gap_upper: (T,) certified upper end of ``g_t``. support: (T,) the term ``max_V <-grad, V>`` of the
            gap.
        descent: (T,) ``<grad L(W_t), W_t - V_t>`` with the true gradient.
        error: (T,) ``eps_t``, how far ``V_t`` misses the minimum under the true gradient.
        distance2: (T,) ``|V_t - W_t|_F^2``. eta: (T,) the steps.
        noise: (T,) ``|G_t - grad L(W_t)|_F`` as the estimator admits to it; zero for the full gradient.
        slack: (T,) width of the interval in which the oracle places the support of the gradient it was given.
        snapshots: a few ``(t, W_t)``, for the checks that recompute.
        final: ``W_{T+1}``.
        problem, oracle, step, estimator, seed: what was run.
    """

    problem: Problem
    oracle: Oracle
    step: Step
    estimator: Estimator
    seed: int
    value: np.ndarray
    gap: np.ndarray
    gap_upper: np.ndarray
    support: np.ndarray
    descent: np.ndarray
    error: np.ndarray
    distance2: np.ndarray
    eta: np.ndarray
    noise: np.ndarray
    slack: np.ndarray
    final: Point
    snapshots: list[tuple[int, Point]] = field(default_factory=list)

    @property
    def T(self) -> int:
        """The number of iterations."""
        return self.eta.size

    @property
    def scale(self) -> float:
        """``s = sqrt(M beta) D / sqrt(T)``."""
        return theorem.scale(self.problem.M, self.problem.beta, self.oracle.diameter, self.T)

    @property
    def average(self) -> float:
        """The average gap, which Theorem 4.1 bounds."""
        return float(self.gap.mean())

    @property
    def smallest(self) -> float:
        """The smallest gap of the run."""
        return float(self.gap.min())

    @property
    def drop(self) -> float:
        """``L(W_1) - L(W_{T+1})``."""
        return float(self.value[0] - self.value[-1])

    @property
    def curvature(self) -> np.ndarray:
        """``c_t = 2 (L_{t+1} - L_t + eta <grad, W_t - V_t>) / eta^2``; NaN where the step is zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            c = 2 * (np.diff(self.value) + self.eta * self.descent) / self.eta**2
        return np.where(self.eta > 0, c, np.nan)


def _worth_keeping(T: int, snapshots: int) -> set[int]:
    """Iterations to keep, evenly spread in log t, always with the first and the last."""
    if snapshots <= 0:
        return set()
    return {1, T} | {round(float(t)) for t in np.geomspace(1, T, min(snapshots, T))}


def frank_wolfe(
    problem: Problem,
    T: int,
    step: Step | None = None,
    *,
    oracle: Oracle | None = None,
    gradient: Estimator | None = None,
    seed: int = 0,
    snapshots: int = 4,
    progress: Callable[[int], None] | None = None,
) -> Run:
    """Run Algorithm 2 for T iterations.

    Args:
        problem: loss, set and constants.
        T: number of iterations, at least 1.
        step: rule for ``eta``; by default `TheoremStep`, which uses ``M``, ``beta``, ``D`` and T.
        oracle: solves the linear problem in place of the problem's own, such as a corrupted one; the gap
            is always measured with the problem's own.
        gradient: estimator of the gradient; by default `FullGradient`.
        seed: of the only generator used; runs with the same arguments repeat bit for bit on the same machine.
        snapshots: how many iterates to keep for the checks, 0 for large problems.
        progress: called with t after each iteration.

    Returns:
        The `Run`.

    Raises:
        ValueError: for a bad argument, or a loss or gap that is no longer finite (with the iteration).

    Example:
        >>> from theory.problems import quadratic
        >>> from theory.oracles import L1Ball
        >>> run = frank_wolfe(quadratic("q", L1Ball(1.0, 3), np.array([2.0, 0, 0])), T=100)
        >>> run.average <= 1.5 * run.scale
        True
    """
    T = count("T", T, "the number of iterations")
    step = TheoremStep() if step is None else step
    gradient = FullGradient() if gradient is None else gradient
    reference = problem.oracle
    oracle = reference if oracle is None else oracle
    if oracle.shape != reference.shape:
        raise ValueError(f"oracle must answer for shape {reference.shape}, got {oracle.shape}: give the problem's set")
    # three independent streams, so that a different oracle never changes the batches that a run sees
    batches, answers, measuring = generator(seed).spawn(3)
    estimate = gradient.begin(problem, batches)
    rule = step.begin(Constants(problem.M, problem.beta, oracle.diameter), T)
    kept = _worth_keeping(T, snapshots)
    names = ("gap", "gap_upper", "support", "descent", "error", "distance2", "eta", "noise", "slack")
    record = {name: np.zeros(T) for name in names}
    value = np.zeros(T + 1)
    keep: list[tuple[int, Point]] = []

    W = problem.start()
    value[0], G = problem.evaluate(W)
    for i in range(T):
        t = i + 1
        if t in kept:
            keep.append((t, W.copy()))
        seen = estimate(t, W, G)
        answer = oracle(seen, at=W, rng=answers)
        V = answer.vertex
        shared = oracle is reference and seen is G
        truth = answer if shared else reference(G, at=W, rng=measuring)
        outward = W.inner(G)
        # an iterative oracle has just scored its vertex on this very gradient; an exact one is scored here
        pairing = -answer.attained if shared and not oracle.exact else inner(G, V)
        record["gap"][i] = truth.attained + outward
        record["gap_upper"][i] = truth.certified + outward
        record["support"][i] = truth.attained
        record["descent"][i] = outward - pairing
        record["slack"][i] = answer.certified - answer.attained
        record["error"][i] = truth.attained + pairing
        record["distance2"][i] = W.distance2(V)
        if gradient.noisy:
            record["noise"][i] = _difference(seen, G)
        seen_descent = outward - pairing if seen is G else W.inner(seen) - inner(seen, V)
        situation = Situation(t, value[i], seen_descent, record["distance2"][i], _trial(problem, W, V))
        record["eta"][i] = eta = rule(situation)
        W.move(V, eta)
        value[t], G = problem.evaluate(W) if t < T else (problem.value(W), G)
        if not (np.isfinite(value[t]) and np.isfinite(record["gap"][i])):
            raise ValueError(
                f"loss and gap must stay finite, got {value[t]} and {record['gap'][i]} at iteration {t} of "
                f"{problem.name!r}: check the loss on all of K"
            )
        if progress is not None:
            progress(t)
    return Run(problem, oracle, step, gradient, seed, value, final=W, snapshots=keep, **record)


def _difference(seen: Gradient, G: Gradient) -> float:
    """``|seen - G|_F`` for dense gradients."""
    if isinstance(seen, np.ndarray) and isinstance(G, np.ndarray):
        return norm(seen - G)
    raise ValueError(f"G must be dense to measure its noise, got {type(seen).__name__} and {type(G).__name__}")


def _trial(problem: Problem, W: Point, V: Vertex) -> Callable[[float], float]:
    """The loss along the segment from ``W`` to ``V``, evaluated on a copy."""

    def trial(eta: float) -> float:
        moved = W.copy()
        moved.move(V, eta)
        return problem.value(moved)

    return trial
