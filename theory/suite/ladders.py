"""Statements about groups of runs: rates over horizons, and ladders over the oracle's error and the batch
size.

The step of Theorem 4.1 depends on T, so a rate is fitted over separate runs, never along one. Expectations
are judged by what is known of the draws, at the level of `theory.checks.significance`: FAIL needs the whole
interval on the wrong side, PASS the whole on the right one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from theory import theorem
from theory.checks import FAIL, PASS, VACUOUS, Check, audit
from theory.checks.noise import gaussian_noise
from theory.checks.record import at_most, pairing_rounding
from theory.checks.significance import LEVEL, gaussian_excess, normal, student
from theory.frank_wolfe import Run, frank_wolfe
from theory.gradient_estimators import Estimate, Estimator, FullGradient, Minibatch
from theory.iterates import Gradient, Point, as_array, inner
from theory.oracles import AdditiveError, MultiplicativeError
from theory.problems import NoisyProblem, Problem
from theory.seeds import generator
from theory.step_sizes import Step, TheoremStep

# of the intervals in tables and pictures; checks have a level of their own
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
    """The Student interval of the mean, for pictures and tables; without width for one sample."""
    values = np.asarray(samples, dtype=float)
    if values.size < 2:
        return Interval(float(values.mean()), 0.0)
    mean, half = student(samples, 1 - confidence)
    return Interval(mean, half)


def expected_at_most(
    name: str, mean: float, bound: float, allowance: float, detail: str = "", largest: float = math.inf
) -> Check:
    """``E x <= bound``; VACUOUS where the mean does not decide, or no value can exceed the bound.

    Args:
        name: the statement. mean: what was measured. bound: the right side.
        allowance: how far the mean may be from its expectation at the level of `theory.checks.significance`.
        detail: for the reader. largest: the largest value that could have been averaged; a bound above it says nothing.
    """
    size = max(abs(bound), abs(mean), np.finfo(float).tiny)
    if mean > bound + allowance:
        verdict = FAIL
    else:
        verdict = PASS if mean + allowance <= bound < largest else VACUOUS
    note = f"{mean:.4g} +- {allowance:.2g}"
    note = f"{detail}; {note}" if detail else note
    return Check(name, verdict, (bound + allowance - mean) / size, mean, bound, note, LEVEL)


@dataclass
class Rung:
    """One setting of a ladder, run once per seed."""

    setting: float
    runs: list[Run]
    checks: list[Check] = field(default_factory=list)
    extra: dict[str, Interval] = field(default_factory=dict)

    @property
    def average(self) -> Interval:
        """The average gap over seeds."""
        return interval([run.average for run in self.runs])


def fitted_slope(horizons: Sequence[int], averages: Sequence[float]) -> float:
    """The least-squares slope of log average against log T."""
    return float(np.polyfit(np.log(horizons), np.log(averages), 1)[0])


def rate_check(runs: Sequence[Run], tolerance: float = 0.03) -> Check:
    """``avg g`` falls as ``T^(-1/2 +- 0.03)`` over at least four separate runs."""
    if len(runs) < 4:
        return Check("slope -1/2", VACUOUS, 0.0, math.nan, -0.5, f"{len(runs)} horizons; a slope needs 4")
    slope = fitted_slope([run.T for run in runs], [run.average for run in runs])
    off = abs(slope + 0.5)
    margin = (tolerance - off) / tolerance
    return Check("slope -1/2", PASS if off <= tolerance else FAIL, margin, slope, -0.5, f"fitted slope {slope:.4f}")


def flatness_check(runs: Sequence[Run], factor: float = 1.3) -> list[Check]:
    """``avg/s`` and ``min/s`` within a factor over the horizons, for a family whose constants grow with T."""
    out = []
    for name, ratios in (
        ("avg/s flat", [run.average / run.scale for run in runs]),
        ("min/s flat", [run.smallest / run.scale for run in runs]),
    ):
        spread = max(ratios) / min(ratios) if min(ratios) > 0 else math.inf
        verdict = VACUOUS if len(runs) < 4 else PASS if spread <= factor else FAIL
        out.append(Check(name, verdict, (factor - spread) / factor, spread, factor, f"spread {spread:.3f}"))
    return out


def _largest(runs: Sequence[Run]) -> float:
    """The largest gap that any of the runs met."""
    return max(float(run.gap.max()) for run in runs)


def _ladder(settings: Sequence[float], seeds: Sequence[int], build: Callable[[float, int], Run]) -> list[Rung]:
    rungs = []
    for setting in settings:
        runs = [build(setting, seed) for seed in seeds]
        checks = [check for run in runs for check in audit(run)]
        rungs.append(Rung(setting, runs, checks))
    return rungs


def epsilon_ladder(
    problem: Callable[[int], Problem],
    T: int,
    epsilons: Sequence[float],
    seeds: Sequence[int],
    adversary: str = "away",
    step: Step | None = None,
) -> list[Rung]:
    """Additive error: ``avg g <= 1.5 s + eps`` for every seed at each ``eps``, the adversary spending all of it.

    Args:
        problem: the problem of a seed. T: horizon. epsilons: the rungs. adversary: see `theory.oracles.inexact`.
    """

    def build(epsilon: float, seed: int) -> Run:
        p = problem(seed)
        return frank_wolfe(p, T, step, oracle=AdditiveError(p.oracle, epsilon, adversary), seed=seed)

    rungs = _ladder(epsilons, seeds, build)
    for rung in rungs:
        excess = [run.average - theorem.FROM_SUBOPTIMALITY * run.scale for run in rung.runs]
        largest = max(float(run.gap.max()) - theorem.FROM_SUBOPTIMALITY * run.scale for run in rung.runs)
        rung.checks.append(_worst(f"avg g - 1.5 s <= eps ({adversary})", rung, excess, rung.setting, largest))
    return rungs


def rho_ladder(
    problem: Callable[[int], Problem],
    T: int,
    rhos: Sequence[float],
    seeds: Sequence[int],
    adversary: str = "stall",
    step: Step | None = None,
) -> list[Rung]:
    """Multiplicative error: ``avg g <= 1.5 s / rho`` for every seed, with no additive floor."""

    def build(rho: float, seed: int) -> Run:
        p = problem(seed)
        return frank_wolfe(p, T, step, oracle=MultiplicativeError(p.oracle, rho, adversary), seed=seed)

    rungs = _ladder(rhos, seeds, build)
    for rung in rungs:
        ratio = [run.average / run.scale for run in rung.runs]
        largest = max(float(run.gap.max()) / run.scale for run in rung.runs)
        name = f"avg g / s <= 1.5 / rho ({adversary})"
        rung.checks.append(_worst(name, rung, ratio, theorem.FROM_SUBOPTIMALITY / rung.setting, largest, relative=True))
    return rungs


def _worst(
    name: str, rung: Rung, values: Sequence[float], bound: float, largest: float, relative: bool = False
) -> Check:
    """``value <= bound`` for the largest over the seeds: it holds for each run, so nothing is left to chance."""
    rounding = max(pairing_rounding(run) / (run.scale if relative else 1.0) for run in rung.runs)
    detail = f"mean {np.mean(values):.4g} over {len(values)} seeds"
    return at_most(name, max(values), bound, rounding, vacuous=bound >= largest, detail=detail)


@dataclass
class _Watch:
    """What a practitioner would see of the gap, at the iterates of a stochastic run."""

    reported: list[float] = field(default_factory=list)
    two_batch: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Watched(Estimator):
    """Minibatches that also record the two gap estimates; its extra draws come from a stream of their own."""

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


def batch_ladder(
    problem: NoisyProblem, T: int, batches: Sequence[int], seeds: Sequence[int], step: Step | None = None
) -> list[Rung]:
    """Minibatch gradients: the expected bound, the bias of the minibatch gap, and an estimate without that
    bias.

    At each batch size b, over seeds: the recorded noise is ``sigma/sqrt(b)``, from both sides;
    ``E avg eps <= min(D sigma/sqrt(b), D E|xi|_op)``; ``E avg g <= 1.5 s`` plus
    the same; the gap of the minibatch gradient is at least the gap in expectation (Jensen: a maximum of noise); and
    ``<G_B, W - V_A>`` with V from batch A and the score from an independent batch B has expectation ``g - eps``.

    Each step's noise has independent entries of known size and does not depend on the past, which gives exact tails.
    With N the number of steps of all seeds: ``eps_t <= D |xi_t|_op``, whose mean is Lipschitz with constant
    ``D/sqrt(N)`` in the noise; the bias is at least ``<xi_t, W_t - V*_t>`` with V* the true vertex, a martingale whose
    Gaussian steps vary by D entries at most; and the score of batch B errs by ``<xi_B, W_t - V_t>``, exactly Gaussian
    given the run.
    """
    rungs = []
    sigma = 0.0 if problem.sigma is None else problem.sigma
    for b in batches:
        watches = [_Watch() for _ in seeds]
        runs = [
            frank_wolfe(problem, T, step, gradient=_Watched(b, watch, seed), seed=seed, snapshots=2)
            for seed, watch in zip(seeds, watches)
        ]
        D, steps = problem.oracle.diameter, T * len(runs)
        entry = sigma / math.sqrt(math.prod(problem.oracle.shape) * b)
        noise = theorem.stochastic_error(D, sigma, b, problem.operator_noise(b))
        rounding = max(pairing_rounding(run) for run in runs)
        allowance = gaussian_excess(D * entry / math.sqrt(steps)) + rounding
        averages = [run.average for run in runs]
        average = float(np.mean(averages))
        reported = [float(np.mean(w.reported)) for w in watches]
        unbiased = [float(np.mean(w.two_batch)) for w in watches]
        off = float(np.mean([u - float((run.gap - run.error).mean()) for u, run in zip(unbiased, runs)]))
        distance2 = sum(float(run.distance2.sum()) for run in runs)
        half = float(normal(entry * math.sqrt(distance2) / steps)) + rounding
        checks = [check for run in runs for check in audit(run)]
        checks += [
            gaussian_noise(runs, b),
            expected_at_most(
                f"E eps <= noise (b = {b})", float(np.mean([run.error.mean() for run in runs])), noise, allowance
            ),
            expected_at_most(
                f"E avg g <= 1.5 s + noise (b = {b})",
                average,
                theorem.FROM_SUBOPTIMALITY * runs[0].scale + noise,
                allowance,
                largest=_largest(runs),
            ),
            expected_at_most(
                f"minibatch gap biased upward (b = {b})", average - float(np.mean(reported)), 0.0, allowance
            ),
            at_most(f"two-batch gap unbiased (b = {b})", abs(off), half, detail=f"off by {off:.3g}", level=LEVEL),
        ]
        extra = {"reported": interval(reported), "two batches": interval(unbiased)}
        extra["bound"] = Interval(1.5 * runs[0].scale + noise, 0.0)
        rungs.append(Rung(b, runs, checks, extra))
    return rungs


def rates_check(slopes: Sequence[float], tolerance: float = 0.03) -> Check:
    """``avg g`` falls as ``T^(-1/2 +- 0.03)`` in expectation, judged over the slopes of independent seeds."""
    mean, half = student(slopes)
    off = abs(mean + 0.5)
    verdict = FAIL if off - half > tolerance else PASS if off + half <= tolerance else VACUOUS
    detail = f"fitted slope {mean:.4f} +- {half:.2g} over {len(slopes)} seeds"
    margin = (tolerance + half - off) / tolerance if math.isfinite(half) else 0.0
    return Check("slope -1/2", verdict, margin, mean, -0.5, detail, LEVEL)


def growing_batch_runs(problem: NoisyProblem, horizons: Sequence[int], seed: int = 0) -> list[Run]:
    """Runs with ``b = sigma^2 T / (M beta)``, which keeps the rate of the full gradient."""
    sigma = problem.sigma or 0.0
    return [
        frank_wolfe(
            problem,
            T,
            gradient=Minibatch(theorem.sufficient_batch(sigma, problem.M, problem.beta, T))
            if sigma
            else FullGradient(),
            seed=seed,
        )
        for T in horizons
    ]


def rate_runs(build: Callable[[int], Problem], horizons: Sequence[int], step: Step | None = None) -> list[Run]:
    """One separate run per horizon, each with its own step."""
    return [frank_wolfe(build(T), T, TheoremStep() if step is None else step) for T in horizons]
