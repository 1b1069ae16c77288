"""Algorithm 2, idealised COLA: stochastic non-convex Frank-Wolfe with an inexact oracle.

    G_t = an estimate of grad L(W_t)
    V_t = oracle(G_t)                      <V_t, G_t> <= min_{V in K} <V, G_t> + eps
    W_{t+1} = W_t + eta (V_t - W_t)

One iteration is one link of a chain: a trained adapter adds ``eta (V_t - W_t)`` to the weights. The loop
records the measurements that `theory.checks` judges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from theory import theorem
from theory.arguments import count
from theory.gradient_estimators import Estimator, FullGradient
from theory.iterates import Gradient, Point, Vertex, inner, norm
from theory.oracles import Answer, Oracle
from theory.problems import Problem
from theory.seeds import generator
from theory.step_sizes import Constants, Situation, Step, TheoremStep

# points of more entries are too large to keep many of them
_LARGE = 512**2


@dataclass(eq=False)
class Run:
    """The record of T iterations; arrays are indexed by t - 1.

    Attributes:
        value: (T+1,) the losses ``L(W_1) .. L(W_{T+1})``.
        gap: (T,) ``g_t``, exact if the set's oracle is exact, else its certified lower end.
        gap_upper: (T,) certified upper end of ``g_t``.
        support: (T,) the term ``max_V <-grad, V>`` of the gap.
        descent: (T,) ``<grad L(W_t), W_t - V_t>`` with the true gradient.
        seen_descent: (T,) ``<G_t, W_t - V_t>`` with the estimated gradient, which the step rule sees.
        error: (T,) ``eps_t``, by which ``V_t`` misses the minimum under the true gradient.
        distance2: (T,) ``|V_t - W_t|_F^2``.
        eta: (T,) the steps.
        noise: (T,) ``|G_t - grad L(W_t)|_F``; zero for the full gradient.
        slack: (T,) width of the oracle's interval for the support of ``-G_t``.
        snapshots: ``(t, W_t)`` at random t, for the checks that recompute; with the first and the last iterate.
        final: ``W_{T+1}``.
        problem, oracle, step, estimator, seed: the arguments of the run.
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
    seen_descent: np.ndarray
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


def frank_wolfe(
    problem: Problem,
    T: int,
    step: Step | None = None,
    *,
    oracle: Oracle | None = None,
    gradient: Estimator | None = None,
    seed: int = 0,
    snapshots: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Run:
    """Run Algorithm 2 for T iterations.

    Args:
        problem: loss, set and constants.
        T: number of iterations, at least 1.
        step: rule for ``eta``; by default `TheoremStep`, which uses ``M``, ``beta``, ``D`` and T.
        oracle: used instead of the problem's own, for example one that errs; the problem's own still measures
            the gap.
        gradient: estimator of the gradient; by default `FullGradient`.
        seed: of all randomness; runs with equal arguments repeat bit for bit on the same machine.
        snapshots: number of random iterates to keep for the checks, besides the first and the last; 0 keeps none. By
            default 32, and 2 above 512 x 512. Whether W_t is kept is drawn after iteration t is measured, so no
            measurement depends on it.
        progress: called with t after each iteration.

    Returns:
        The `Run`.

    Raises:
        ValueError: an argument is bad, or loss or gap are no longer finite; the message has the iteration.

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
    # independent streams, so that another oracle does not change the batches of a run
    batches, answers, measuring, keeping = generator(seed).spawn(4)
    estimate = gradient.begin(problem, batches)
    rule = step.begin(Constants(problem.M, problem.beta, oracle.diameter), T)
    record = _Recorder(problem, oracle, gradient, T, measuring)
    if snapshots is None:
        snapshots = 32 if math.prod(oracle.shape) <= _LARGE else 2
    kept = _Reservoir(snapshots, T, keeping)

    W = problem.start()
    value, G = problem.evaluate(W)
    record.value[0] = value
    for t in range(1, T + 1):
        G_t = estimate(t, W, G)
        answer = oracle(G_t, at=W, rng=answers)
        eta = rule(record.before(t, W, G, G_t, answer))
        kept.offer(t, W)
        W.move(answer.vertex, eta)
        value, G = problem.evaluate(W) if t < T else (problem.value(W), G)
        record.after(t, eta, value)
        if progress is not None:
            progress(t)
    return Run(problem, oracle, step, gradient, seed, record.value, final=W, snapshots=kept.sorted(), **record.arrays)


class _Reservoir:
    """Keeps random iterates of a run, and the first and the last (reservoir sampling, Vitter's algorithm R).

    Args:
        size: number of random iterates; with 0 none is kept. T: of the run. rng: draws which ones.
    """

    def __init__(self, size: int, T: int, rng: np.random.Generator):
        self.size, self.T, self.rng = size, T, rng
        self.ends: list[tuple[int, Point]] = []
        self.drawn: list[tuple[int, Point]] = []

    def offer(self, t: int, W: Point) -> None:
        """Keep a copy of ``W_t`` or not: iterate t is drawn with probability ``size / t``, and replaces another."""
        if self.size == 0:
            return
        if t in (1, self.T):
            self.ends.append((t, W.copy()))
        place = t - 1 if t <= self.size else int(self.rng.integers(t))
        if place < self.size:
            self.drawn[place : place + 1] = [(t, W.copy())]

    def sorted(self) -> list[tuple[int, Point]]:
        """The kept iterates by t, each once."""
        return sorted(dict(self.ends + self.drawn).items())


class _Recorder:
    """Fills the arrays of a `Run`; index t - 1 belongs to iteration t.

    Args:
        problem, oracle, estimator, T: those of the run. rng: for the problem's oracle, which measures the gap.
    """

    def __init__(self, problem: Problem, oracle: Oracle, estimator: Estimator, T: int, rng: np.random.Generator):
        self.problem, self.oracle, self.estimator, self.rng = problem, oracle, estimator, rng
        self.value = np.zeros(T + 1)
        names = ("gap", "gap_upper", "support", "descent", "seen_descent", "error", "distance2", "eta", "noise")
        self.arrays = {name: np.zeros(T) for name in (*names, "slack")}

    def before(self, t: int, W: Point, G: Gradient, G_t: Gradient, answer: Answer) -> Situation:
        """Measure iteration t before its move, with the true gradient ``G``; returns the step rule's input."""
        V, i, reference = answer.vertex, t - 1, self.problem.oracle
        shared = self.oracle is reference and G_t is G
        truth = answer if shared else reference(G, at=W, rng=self.rng)
        outward = W.inner(G)
        # an oracle that is not exact has just scored its vertex on this gradient
        pairing = -answer.attained if shared and not self.oracle.exact else inner(G, V)
        measured = {
            "gap": truth.attained + outward,
            "gap_upper": truth.certified + outward,
            "support": truth.attained,
            "descent": outward - pairing,
            "seen_descent": outward - pairing if G_t is G else W.inner(G_t) - inner(G_t, V),
            "slack": answer.certified - answer.attained,
            "error": truth.attained + pairing,
            "distance2": W.distance2(V),
            "noise": _difference(G_t, G) if self.estimator.noisy else 0.0,
        }
        for name, number in measured.items():
            self.arrays[name][i] = number
        trial = _trial(self.problem, W, V)
        return Situation(t, self.value[i], measured["seen_descent"], measured["distance2"], trial)

    def after(self, t: int, eta: float, value: float) -> None:
        """Record the move of iteration t, and check that loss and gap are finite."""
        self.arrays["eta"][t - 1], self.value[t] = eta, value
        gap = self.arrays["gap"][t - 1]
        if not (np.isfinite(value) and np.isfinite(gap)):
            raise ValueError(
                f"loss and gap must stay finite, got {value} and {gap} at iteration {t} of "
                f"{self.problem.name!r}: check the loss on all of K"
            )


def _difference(G_t: Gradient, G: Gradient) -> float:
    """``|G_t - G|_F`` for dense gradients."""
    if isinstance(G_t, np.ndarray) and isinstance(G, np.ndarray):
        return norm(G_t - G)
    raise ValueError(f"G must be dense to measure its noise, got {type(G_t).__name__} and {type(G).__name__}")


def _trial(problem: Problem, W: Point, V: Vertex) -> Callable[[float], float]:
    """The loss along the segment from ``W`` to ``V``, evaluated on a copy."""

    def trial(eta: float) -> float:
        moved = W.copy()
        moved.move(V, eta)
        return problem.value(moved)

    return trial
