"""Statements about groups of runs: rates over horizons, and ladders over the oracle's error and the batch
size.

The step of Theorem 4.1 depends on T, so a rate is fitted over separate runs, never along one. Expectations
are judged by a Student interval over seeds: FAIL needs the whole interval on the wrong side, PASS the
whole on the right one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from theory import bounds
from theory.audit import audit
from theory.checks import FAIL, PASS, VACUOUS, Check
from theory.corrupted import AdditiveError, MultiplicativeError
from theory.frank_wolfe import Run, frank_wolfe
from theory.gradients import Estimate, Estimator, FullGradient, Minibatch
from theory.noise import CONFIDENCE, gaussian_noise
from theory.points import Gradient, Point, as_array, inner
from theory.problems import NoisyProblem, Problem
from theory.steps import Step, TheoremStep


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
    """The Student interval of the mean; without width for one sample, which then speaks for itself."""
    values = np.asarray(samples, dtype=float)
    if values.size < 2:
        return Interval(float(values.mean()), 0.0)
    quantile = float(stats.t.ppf((1 + confidence) / 2, values.size - 1))
    return Interval(float(values.mean()), quantile * float(values.std(ddof=1)) / math.sqrt(values.size))


def expected_at_most(
    name: str, samples: Sequence[float], bound: float, detail: str = "", largest: float = math.inf
) -> Check:
    """``E x <= bound`` judged over seeds; VACUOUS where the seeds do not decide, or no value can exceed the bound.

    Args:
        name: the statement. samples: one number per seed. bound: the right side. detail: for the reader.
        largest: the largest value that could have been averaged; a bound above it says nothing.
    """
    seen = interval(samples)
    margin = (bound - seen.mean) / max(abs(bound), abs(seen.mean), np.finfo(float).tiny)
    verdict = PASS if seen.high <= bound < largest else FAIL if seen.low > bound else VACUOUS
    note = f"{seen.mean:.4g} +- {seen.half:.2g} over {len(samples)} seeds"
    return Check(name, verdict, margin, seen.mean, bound, f"{detail}; {note}" if detail else note)


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
    """Additive error: ``E avg g <= 1.5 s + eps`` at each ``eps``, with the adversary spending all of it.

    Args:
        problem: the problem of a seed. T: horizon. epsilons: the rungs. adversary: see `theory.corrupted`.
    """

    def build(epsilon: float, seed: int) -> Run:
        p = problem(seed)
        return frank_wolfe(p, T, step, oracle=AdditiveError(p.oracle, epsilon, adversary), seed=seed)

    rungs = _ladder(epsilons, seeds, build)
    for rung in rungs:
        excess = [run.average - bounds.FROM_SUBOPTIMALITY * run.scale for run in rung.runs]
        largest = _largest(rung.runs) - bounds.FROM_SUBOPTIMALITY * rung.runs[0].scale
        name = f"E avg g - 1.5 s <= eps ({adversary})"
        rung.checks.append(expected_at_most(name, excess, rung.setting, largest=largest))
    return rungs


def rho_ladder(
    problem: Callable[[int], Problem],
    T: int,
    rhos: Sequence[float],
    seeds: Sequence[int],
    adversary: str = "stall",
    step: Step | None = None,
) -> list[Rung]:
    """Multiplicative error: ``E avg g <= 1.5 s / rho``, with no additive floor."""

    def build(rho: float, seed: int) -> Run:
        p = problem(seed)
        return frank_wolfe(p, T, step, oracle=MultiplicativeError(p.oracle, rho, adversary), seed=seed)

    rungs = _ladder(rhos, seeds, build)
    for rung in rungs:
        ratio = [run.average / run.scale for run in rung.runs]
        largest = _largest(rung.runs) / rung.runs[0].scale
        name = f"E avg g / s <= 1.5 / rho ({adversary})"
        rung.checks.append(expected_at_most(name, ratio, 1.5 / rung.setting, largest=largest))
    return rungs


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
        plain, second = Minibatch(self.batch).begin(problem, rng), np.random.default_rng([self.seed, 1])

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
    """
    rungs = []
    sigma = 0.0 if problem.sigma is None else problem.sigma
    for b in batches:
        watches = [_Watch() for _ in seeds]
        runs = [
            frank_wolfe(problem, T, step, gradient=_Watched(b, watch, seed), seed=seed, snapshots=2)
            for seed, watch in zip(seeds, watches)
        ]
        D = problem.oracle.diameter
        noise = bounds.stochastic_error(D, sigma, b, problem.operator_noise(b))
        averages = [run.average for run in runs]
        reported = [float(np.mean(w.reported)) for w in watches]
        unbiased = [float(np.mean(w.two_batch)) for w in watches]
        bias = [r - a for r, a in zip(reported, averages)]
        off = interval([u - float((run.gap - run.error).mean()) for u, run in zip(unbiased, runs)])
        # one seed has no interval; then the statement is only that the estimate is below the reported gap
        checks = [check for run in runs for check in audit(run)]
        checks += [
            gaussian_noise(runs, b),
            expected_at_most(f"E eps <= noise (b = {b})", [float(run.error.mean()) for run in runs], noise),
            expected_at_most(
                f"E avg g <= 1.5 s + noise (b = {b})", averages, 1.5 * runs[0].scale + noise, largest=_largest(runs)
            ),
            expected_at_most(f"minibatch gap biased upward (b = {b})", [-x for x in bias], 0.0),
        ]
        if len(seeds) > 1:
            verdict = PASS if abs(off.mean) <= off.half else FAIL
            checks.append(
                Check(f"two-batch gap unbiased (b = {b})", verdict, off.half - abs(off.mean), off.mean, off.half)
            )
        extra = {"reported": interval(reported), "two batches": interval(unbiased)}
        extra["bound"] = Interval(1.5 * runs[0].scale + noise, 0.0)
        rungs.append(Rung(b, runs, checks, extra))
    return rungs


def growing_batch_runs(problem: NoisyProblem, horizons: Sequence[int], seed: int = 0) -> list[Run]:
    """Runs with ``b = sigma^2 T / (M beta)``, which keeps the rate of the full gradient."""
    sigma = problem.sigma or 0.0
    return [
        frank_wolfe(
            problem,
            T,
            gradient=Minibatch(bounds.sufficient_batch(sigma, problem.M, problem.beta, T)) if sigma else FullGradient(),
            seed=seed,
        )
        for T in horizons
    ]


def rate_runs(build: Callable[[int], Problem], horizons: Sequence[int], step: Step | None = None) -> list[Run]:
    """One separate run per horizon, each with its own step."""
    return [frank_wolfe(build(T), T, TheoremStep() if step is None else step) for T in horizons]
