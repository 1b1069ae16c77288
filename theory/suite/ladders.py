"""Ladders: the same problem over rising oracle errors and batch sizes, several seeds per rung.

An expectation is judged by the known distribution of the draws, at the level of `theory.checks.significance`:
it FAILs if the whole interval lies on the wrong side, and PASSes if the whole interval lies on the right one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from scipy import stats

from theory import theorem
from theory.checks import Check, audit
from theory.checks.check import at_most, expected_at_most
from theory.checks.noise import gaussian_noise
from theory.checks.record import pairing_rounding
from theory.checks.significance import LEVEL, e_value, gaussian_excess, normal
from theory.frank_wolfe import Run, frank_wolfe
from theory.gradient_estimators import Estimate, Estimator, FullGradient, Minibatch
from theory.iterates import Gradient, Point, as_array, inner
from theory.oracles import AdditiveError, MultiplicativeError, Oracle
from theory.problems import NoisyProblem, Problem
from theory.seeds import generator, run_seeds

# of the intervals in tables and pictures; checks have their own level
CONFIDENCE = 0.999


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with the half width of its Student interval."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half


def interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The Student interval of the mean, for pictures and tables; of zero width for one sample. No check uses it."""
    values = np.asarray(samples, dtype=float)
    if values.size < 2:
        return Interval(float(values.mean()), 0.0)
    quantile = float(stats.t.isf((1 - confidence) / 2, values.size - 1))
    return Interval(float(values.mean()), quantile * float(values.std(ddof=1)) / math.sqrt(values.size))


@dataclass
class Rung:
    """One setting of a ladder, run once per seed.

    Attributes:
        setting: of the rung. runs: one per seed. checks: of the runs and of the rung.
        extra: other quantities, with their intervals. deviations: of the two-batch gap from its mean, standardised.
    """

    setting: float
    runs: list[Run]
    checks: list[Check]
    extra: dict[str, Interval] = field(default_factory=dict)
    deviations: float = 0.0

    @property
    def average(self) -> Interval:
        """The average gap over seeds."""
        return interval([run.average for run in self.runs])


def epsilon_ladder(
    problem: Callable[[int], Problem],
    T: int,
    epsilons: Sequence[float],
    seeds: int,
    adversary: str = "away",
    seed: int = 0,
) -> list[Rung]:
    """Additive error: ``avg g <= 1.5 s + eps`` for every seed at each ``eps``, all of which the adversary spends.

    Args:
        problem: the problem of a seed. T: horizon. epsilons: the rungs. seeds: runs per rung.
        adversary: ``"away"`` or ``"stall"``, see `theory.oracles.inexact`.
        seed: of the ladder; every rung has runs of its own.
    """

    def judge(rung: Rung) -> Check:
        excess = [run.average - theorem.FROM_SUBOPTIMALITY * run.scale for run in rung.runs]
        largest = max(float(run.gap.max()) - theorem.FROM_SUBOPTIMALITY * run.scale for run in rung.runs)
        rounding = max(pairing_rounding(run) for run in rung.runs)
        return _worst(f"avg g - 1.5 s <= eps ({adversary})", excess, rung.setting, largest, rounding)

    draws = partial(run_seeds, seed, seeds, f"epsilon {adversary}")
    return _oracle_ladder(problem, T, epsilons, draws, lambda K, eps: AdditiveError(K, eps, adversary), judge)


def rho_ladder(
    problem: Callable[[int], Problem],
    T: int,
    rhos: Sequence[float],
    seeds: int,
    adversary: str = "stall",
    seed: int = 0,
) -> list[Rung]:
    """Multiplicative error: ``avg g <= 1.5 s / rho`` for every seed, with no additive floor.

    Arguments as in `epsilon_ladder`.
    """

    def judge(rung: Rung) -> Check:
        ratio = [run.average / run.scale for run in rung.runs]
        largest = max(float(run.gap.max()) / run.scale for run in rung.runs)
        rounding = max(pairing_rounding(run) / run.scale for run in rung.runs)
        bound = theorem.FROM_SUBOPTIMALITY / rung.setting
        return _worst(f"avg g / s <= 1.5 / rho ({adversary})", ratio, bound, largest, rounding)

    draws = partial(run_seeds, seed, seeds, f"rho {adversary}")
    return _oracle_ladder(problem, T, rhos, draws, lambda K, rho: MultiplicativeError(K, rho, adversary), judge)


def _oracle_ladder(
    problem: Callable[[int], Problem],
    T: int,
    settings: Sequence[float],
    draws: Callable[[str], list[int]],
    oracle: Callable[[Oracle, float], Oracle],
    judge: Callable[[Rung], Check],
) -> list[Rung]:
    rungs = []
    for setting in settings:
        seeds = draws(f"{setting:g}")
        problems = [problem(seed) for seed in seeds]
        runs = [frank_wolfe(p, T, oracle=oracle(p.oracle, setting), seed=seed) for p, seed in zip(problems, seeds)]
        rung = Rung(setting, runs, [check for run in runs for check in audit(run)])
        rung.checks.append(judge(rung))
        rungs.append(rung)
    return rungs


def _worst(name: str, values: Sequence[float], bound: float, largest: float, rounding: float) -> Check:
    """``value <= bound`` for every seed; nothing about it is random."""
    detail = f"mean {np.mean(values):.4g} over {len(values)} seeds"
    return at_most(name, max(values), bound, rounding, vacuous=bound >= largest, detail=detail)


@dataclass
class _Watch:
    """The gap as a practitioner could estimate it, at the iterates of a stochastic run."""

    reported: list[float] = field(default_factory=list)
    two_batch: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Watched(Estimator):
    """Minibatches that also record both gap estimates; the extra draws come from a separate stream."""

    batch: int
    watch: _Watch
    seed: int
    name: str = "watched batch"

    def begin(self, problem: Problem, rng: np.random.Generator) -> Estimate:
        assert isinstance(problem, NoisyProblem)
        plain, second = Minibatch(self.batch).begin(problem, rng), generator(self.seed, 1)

        def estimate(t: int, W: Point, G: Gradient) -> Gradient:
            first = plain(t, W, G)
            answer = problem.oracle(first, at=W, rng=second)
            fresh = problem.batch_gradient(W, problem.draw(second, self.batch))
            self.watch.reported.append(answer.attained + W.inner(first))
            self.watch.two_batch.append(W.inner(fresh) - inner(as_array(fresh), answer.vertex))
            return first

        return estimate


def batch_ladder(problem: NoisyProblem, T: int, batches: Sequence[int], seeds: int, seed: int = 0) -> list[Rung]:
    """Minibatch gradients: the expected bound, the bias of the minibatch gap, and an unbiased estimate.

    At each batch size b, over seeds:

    * the recorded noise is ``sigma/sqrt(b)``, from both sides;
    * ``E avg eps <= min(D sigma/sqrt(b), D E|xi|_op)``, and ``E avg g <= 1.5 s`` plus the same;
    * the gap of the minibatch gradient is at least the gap in expectation (Jensen: a maximum of noise);
    * ``<G_B, W - V_A>``, with V from batch A and the score from an independent batch B, has expectation
      ``g - eps``.

    The noise of a step has independent entries of known size and does not depend on the past, which gives
    exact tails. Let N be the number of steps of all seeds. First, ``eps_t <= D |xi_t|_op``, and its mean is
    Lipschitz in the noise with constant ``D/sqrt(N)``. Second, the bias is at least ``<xi_t, W_t - V*_t>``
    with V* the true vertex, a martingale whose Gaussian steps vary by at most D entries. Third, the score of
    batch B errs by ``<xi_B, W_t - V_t>``, which is Gaussian given the run, with a variance that the run shows. A bias
    too small for one rung adds up over them: the last rung has a check of all rungs together, by their e-value.

    Args:
        problem: with noise. T: horizon. batches: the rungs. seeds: runs per rung. seed: of the ladder.
    """
    rungs = []
    sigma = 0.0 if problem.sigma is None else problem.sigma
    for b in batches:
        watches = [(draw, _Watch()) for draw in run_seeds(seed, seeds, "batch", f"{b}")]
        runs = [frank_wolfe(problem, T, gradient=_Watched(b, watch, draw), seed=draw) for draw, watch in watches]
        D, steps = problem.oracle.diameter, T * len(runs)
        entry = sigma / math.sqrt(math.prod(problem.oracle.shape) * b)
        noise = theorem.stochastic_error(D, sigma, b, problem.operator_noise(b))
        bound = theorem.FROM_SUBOPTIMALITY * runs[0].scale + noise
        rounding = max(pairing_rounding(run) for run in runs)
        allowance = gaussian_excess(D * entry / math.sqrt(steps)) + rounding
        average = float(np.mean([run.average for run in runs]))
        error = float(np.mean([run.error.mean() for run in runs]))
        reported = [float(np.mean(w.reported)) for _, w in watches]
        unbiased = [float(np.mean(w.two_batch)) for _, w in watches]
        off = float(np.mean([u - float((run.gap - run.error).mean()) for u, run in zip(unbiased, runs)]))
        distance2 = sum(float(run.distance2.sum()) for run in runs)
        deviation = entry * math.sqrt(distance2) / steps
        half = float(normal(deviation)) + rounding
        largest = max(float(run.gap.max()) for run in runs)
        checks = [
            *(check for run in runs for check in audit(run)),
            gaussian_noise(runs, b),
            expected_at_most(f"E eps <= noise (b = {b})", error, noise, allowance),
            expected_at_most(f"E avg g <= 1.5 s + noise (b = {b})", average, bound, allowance, largest=largest),
            expected_at_most(
                f"minibatch gap biased upward (b = {b})", average - float(np.mean(reported)), 0.0, allowance
            ),
            at_most(f"two-batch gap unbiased (b = {b})", abs(off), half, detail=f"off by {off:.3g}", level=LEVEL),
        ]
        extra = {"reported": interval(reported), "two batches": interval(unbiased), "bound": Interval(bound, 0.0)}
        extra["gap minus error"] = interval([float((run.gap - run.error).mean()) for run in runs])
        # without noise the deviation is zero, and only rounding is left
        rungs.append(Rung(b, runs, checks, extra, off / deviation if deviation > rounding else 0.0))
    evidence = e_value([rung.deviations for rung in rungs])
    detail = "deviations " + ", ".join(f"{rung.deviations:.2f}" for rung in rungs)
    pooled = at_most("two-batch gap unbiased (all b)", evidence, 1 / LEVEL, detail=detail, level=LEVEL)
    rungs[-1].checks.append(pooled)
    return rungs


def growing_batch_runs(problem: NoisyProblem, horizons: Sequence[int], seed: int = 0) -> list[Run]:
    """Runs with ``b = sigma^2 T / (M beta)``, which keeps the rate of the full gradient."""

    def gradient(T: int) -> Estimator:
        if not problem.sigma:
            return FullGradient()
        return Minibatch(theorem.sufficient_batch(problem.sigma, problem.M, problem.beta, T))

    return [frank_wolfe(problem, T, gradient=gradient(T), seed=seed) for T in horizons]
