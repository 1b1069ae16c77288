"""The tasks of the standard suite, and the records that they return.

A `Task` is a name and a function without arguments, so that the command can show its progress. The sizes make
the suite take about a minute on two cores.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from theory.checks import FAIL, PASS, VACUOUS, Check, audit, noise, rates
from theory.checks.check import at_most
from theory.checks.significance import LEVEL
from theory.frank_wolfe import Run, frank_wolfe
from theory.gradient_estimators import ESTIMATORS, Estimator
from theory.oracles import AdditiveError, MultiplicativeError, NewtonSchulzBall, Oracle, SpectralBall, TraceBall
from theory.problems import NoisyProblem, Problem, StochasticProblem
from theory.problems.instances import INSTANCES, TIGHT
from theory.problems.tight import magnitude_counterexample, one_step_worst_case, trace_quadratic
from theory.seeds import run_seeds
from theory.step_sizes import STEPS, Step, TheoremStep
from theory.suite import ladders, momentum, restarts


@dataclass
class Record:
    """One line of the table and of the JSON file: a run, or a group of runs, with its checks."""

    label: str
    kind: str
    T: int
    average: float
    smallest: float
    scale: float
    checks: list[Check]
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list, repr=False)
    rungs: list[ladders.Rung] = field(default_factory=list, repr=False)

    def count(self, verdict: str) -> int:
        """How many of the checks have this verdict."""
        return sum(check.verdict == verdict for check in self.checks)

    @property
    def verdict(self) -> str:
        """FAIL if any check fails, PASS if any other passes, else VACUOUS."""
        return FAIL if self.count(FAIL) else PASS if self.count(PASS) else VACUOUS

    @property
    def seeds(self) -> list[int]:
        """The seeds of its runs, each once."""
        return self.facts.get("seeds") or sorted({run.seed for run in self.runs})

    def as_json(self) -> str:
        """The record as a JSON line, without the runs."""
        line = {
            "label": self.label,
            "kind": self.kind,
            "verdict": self.verdict,
            "T": self.T,
            "average": self.average,
            "smallest": self.smallest,
            "s": self.scale,
            "average_over_s": self.average / self.scale,
            "smallest_over_s": self.smallest / self.scale,
            "seconds": round(self.seconds, 3),
            **self.facts,
            "checks": [check.as_dict() for check in self.checks],
        }
        return json.dumps(_finite(line))


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Task:
    """One piece of the suite."""

    name: str
    run: Callable[[], list[Record]]


def run_record(label: str, run: Run, seconds: float, checks: list[Check] | None = None) -> Record:
    """The record of a single run, audited unless checks are given."""
    p, started = run.problem, time.perf_counter()
    checks = audit(run) if checks is None else checks
    facts = {
        "problem": p.name,
        "step": run.step.name,
        "oracle": repr(run.oracle),
        "epsilon": run.oracle.epsilon,
        "rho": run.oracle.rho,
        "gradient": run.estimator.name,
        "seed": run.seed,
        "M": p.M,
        "beta": p.beta,
        "D": run.oracle.diameter,
        "R": run.oracle.circumradius,
        "first_gap": float(run.gap[0]),
        "drop": run.drop,
    }
    seconds += time.perf_counter() - started
    return Record(label, "run", run.T, run.average, run.smallest, run.scale, checks, seconds, facts, [run])


def single(
    name: str,
    T: int,
    step: Step | None = None,
    seed: int = 0,
    oracle: Callable[[Problem], Oracle] | None = None,
    gradient: Estimator | None = None,
    sigma: float | None = None,
    tag: str = "",
    level: float = LEVEL,
) -> Record:
    """One audited run of a named instance.

    Args:
        name: key of `INSTANCES`.
        oracle: makes the run's oracle from the problem; by default it is the problem's own.
        gradient: estimator of the gradient, exact by default.
        sigma: size of the noise to add for an estimated gradient if the problem draws no batches.
        tag: suffix of the label.
        level: of each statistical check of an estimated gradient; there are at most three.
    """
    problem = INSTANCES[name].build(T, seed)
    if gradient is not None and gradient.noisy and not isinstance(problem, StochasticProblem):
        problem = NoisyProblem(problem, 2.0 if sigma is None else sigma)
    started, solver = time.perf_counter(), None if oracle is None else oracle(problem)
    run = frank_wolfe(problem, T, step, seed=seed, oracle=solver, gradient=gradient)
    record = run_record(name + tag, run, time.perf_counter() - started)
    if run.estimator.noisy:
        record.checks += noise.estimate_checks(run, level)
    return record


def rate(name: str, horizons: Sequence[int], seed: int = 0) -> list[Record]:
    """The records of separate runs over horizons, and of their rate."""
    out = [single(name, T, seed=seed) for T in horizons]
    return [*out, rate_record(name, out)]


def rate_record(name: str, records: Sequence[Record]) -> Record:
    """The slope over separate runs, or flatness in units of s for G, whose constants grow with T."""
    runs, last = [record.runs[0] for record in records], records[-1]
    checks = rates.flatness_check(runs) if name == "G" else [rates.rate_check(runs)]
    return Record(f"{name} rate", "rate", last.T, last.average, last.smallest, last.scale, checks, 0.0, {}, runs)


def ladder_record(label: str, kind: str, rungs: list[ladders.Rung], seconds: float) -> list[Record]:
    """One record per rung."""
    out = []
    for rung in rungs:
        run = rung.runs[0]
        seeds = [run.seed for run in rung.runs]
        facts: dict[str, Any] = {kind: rung.setting, "seeds": seeds, "half_width": rung.average.half}
        facts |= {key: value.mean for key, value in rung.extra.items()}
        smallest = float(np.mean([r.smallest for r in rung.runs]))
        out.append(
            Record(
                f"{label} {rung.setting:g}",
                kind,
                run.T,
                rung.average.mean,
                smallest,
                run.scale,
                rung.checks,
                seconds / len(rungs),
                facts,
                rung.runs,
                [rung],
            )
        )
    return out


def oracle_task(kind: str, settings: Sequence[float], seeds: int, seed: int = 0, T: int = 1000) -> list[Record]:
    """The ladder of kind ``"epsilon"`` or ``"rho"`` on F from random vertices, against both adversaries."""
    label, ladder = {"epsilon": ("eps", ladders.epsilon_ladder), "rho": ("rho", ladders.rho_ladder)}[kind]
    out = []
    for adversary in ("away", "stall"):
        started = time.perf_counter()
        rungs = ladder(lambda s: trace_quadratic(seed=s), T, settings, seeds, adversary, seed)
        out += ladder_record(f"F {label} {adversary}", kind, rungs, time.perf_counter() - started)
    return out


def batch_task(batches: Sequence[int], seeds: int, seed: int = 0, T: int = 1000, sigma: float = 2.0) -> list[Record]:
    """The batch ladder on F with Gaussian noise."""
    started = time.perf_counter()
    rungs = ladders.batch_ladder(NoisyProblem(trace_quadratic(), sigma), T, batches, seeds, seed)
    return ladder_record("F batch", "batch", rungs, time.perf_counter() - started)


def growing_batches(seeds: int, seed: int = 0) -> list[Record]:
    """``b = sigma^2 T/(M beta)`` keeps the slope of -1/2."""
    started, problem = time.perf_counter(), NoisyProblem(trace_quadratic(), 2.0)
    draws = run_seeds(seed, seeds, "growing batches")
    runs = [ladders.growing_batch_runs(problem, (60, 120, 240, 480), draw) for draw in draws]
    slopes = [rates.fitted_slope([r.T for r in group], [r.average for r in group]) for group in runs]
    longest = [group[-1] for group in runs]
    average, smallest = (float(np.mean([getattr(r, what) for r in longest])) for what in ("average", "smallest"))
    checks = [rates.rates_check(slopes)]
    seconds = time.perf_counter() - started
    facts, last = {"seeds": draws}, longest[0]
    return [Record("F b ~ T rate", "rate", last.T, average, smallest, last.scale, checks, seconds, facts)]


def momentum_task(name: str, averaged: bool, seeds: int, seed: int = 0) -> list[Record]:
    """The rate with one sample per step on the ``"trace"`` or the ``"spectral"`` ball: ``T^(-1/4)`` with momentum."""
    started, problem = time.perf_counter(), momentum.problem(name)
    label = f"b = 1, {name}, {'momentum' if averaged else 'plain'} rate"
    draws = momentum.run_seeds(seed, seeds, label)
    groups = [momentum.momentum_runs(problem, averaged, draw) for draw in draws]
    slopes = [rates.fitted_slope([r.T for r in group], [r.average for r in group]) for group in groups]
    longest = [group[-1] for group in groups]
    average, smallest = (float(np.mean([getattr(r, what) for r in longest])) for what in ("average", "smallest"))
    checks = [check for run in groups[0] for check in audit(run)]
    checks += [momentum.noise_check(runs) for runs in zip(*groups)]
    tolerance = momentum.slope_tolerance(problem)
    checks.append(momentum.falls_check(slopes, tolerance) if averaged else momentum.stalled_check(slopes))
    facts, last = {"seeds": draws}, longest[0]
    seconds = time.perf_counter() - started
    return [Record(label, "rate", last.T, average, smallest, last.scale, checks, seconds, facts)]


def restarts_task(seed: int) -> list[Record]:
    """A chain that fails at the rate 1/L, and its projected variant; the column of the gap is the growth per link."""
    started = time.perf_counter()
    plain, projected, grows, shrinks = restarts.restart_checks(seed)
    seconds, T = (time.perf_counter() - started) / 2, restarts.LINKS
    return [
        Record("chain at 1/L", "restarts", T, grows, grows, 1.0, plain, seconds),
        Record("chain at 1/L, projected", "restarts", T, shrinks, shrinks, 1.0, projected, seconds),
    ]


def constants_task() -> list[Record]:
    """The constants: instances that must exceed the paper's 2 s, and two that attain 1.5 s and 2.5 s."""
    out = []
    for lifted in (False, True):
        run = frank_wolfe(magnitude_counterexample(lifted=lifted), 3000)
        ratio = run.average / run.scale
        checks = [
            at_most("2 s is exceeded when only |L| <= M", 2.0, ratio, detail=f"avg/s = {ratio:.4f}"),
            at_most("2.5 s holds when |L| <= M", ratio, 2.5),
        ]
        out.append(run_record("|L|<=M" + (" lifted" if lifted else ""), run, 0.0, checks))
    for constant in (1.5, 2.5):
        run = frank_wolfe(one_step_worst_case(constant), 1)
        ratio = run.average / run.scale
        checks = [at_most(f"{constant} s is attained at T = 1", abs(ratio - constant), 0.0, 4 * np.finfo(float).eps)]
        out.append(run_record(f"one step {constant}", run, 0.0, checks))
    return out


def muon_task(seed: int) -> list[Record]:
    """Muon's oracle on the spectral ball, with the optimum inside and on the boundary."""

    def muon(problem: Problem) -> Oracle:
        ball = problem.oracle
        assert isinstance(ball, SpectralBall)
        return NewtonSchulzBall(ball.tau, (ball.shape[0], ball.shape[1]))

    names = [f"quadratic-spectral-{where}" for where in ("interior", "boundary")]
    return [single(name, 400, seed=seed, oracle=muon, tag=" Newton-Schulz") for name in names]


def estimators_task(seed: int) -> list[Record]:
    """Every estimator on a finite sum."""
    return [
        single("tanh", 1000, gradient=e, seed=run_seeds(seed, 1, "estimators", e.name)[0], tag=f" {e.name}")
        for e in ESTIMATORS
    ]


def standard(
    seeds: int = 8,
    seed: int = 0,
    epsilons: Sequence[float] = (0.0, 0.01, 0.02, 0.05, 0.1),
    rhos: Sequence[float] = (1.0, 0.7, 0.5, 0.3, 0.2),
    batches: Sequence[int] = (1, 16, 256, 4096),
) -> Iterator[Task]:
    """The tasks of the standard suite.

    Args:
        seeds: runs per rung of a ladder. seed: of all draws. epsilons, rhos, batches: the rungs.
    """
    few = max(2, seeds // 2)
    for name in TIGHT:
        yield Task(f"{name}: rate", partial(rate, name, INSTANCES[name].horizons, seed))
    for name, T in (("A", 1000), ("F", 1000), ("B2", 1000), ("G", 200)):
        for step in STEPS.values():
            if step != TheoremStep():
                yield Task(f"{name}: {step.name}", partial(_one, name, T, seed, step, f" {step.name}"))
    yield Task("constants", constants_task)
    yield Task("epsilon ladder", partial(oracle_task, "epsilon", epsilons, few, seed))
    yield Task("rho ladder", partial(oracle_task, "rho", rhos, few, seed))
    yield Task("batch ladder", partial(batch_task, batches, seeds, seed))
    # short runs, but twice as many: their slopes are counted, and fewer than nine could not fail at this level
    yield Task("growing batches", partial(growing_batches, 2 * seeds, seed))
    yield Task("estimators", partial(estimators_task, seed))
    yield Task("chain at 1/L", partial(restarts_task, seed))
    for ball, averaged in (("trace", True), ("spectral", True), ("spectral", False)):
        named = f"{ball} ball, {'momentum' if averaged else 'one sample'}"
        yield Task(named, partial(momentum_task, ball, averaged, 2 * seeds, seed))
    yield Task("Muon's oracle", partial(muon_task, seed))
    for name, instance in INSTANCES.items():
        if name not in TIGHT:
            yield Task(name, partial(_one, name, instance.horizons[0], seed))


def _one(name: str, T: int, seed: int, step: Step | None = None, tag: str = "") -> list[Record]:
    return [single(name, T, step, seed, tag=tag)]


def oracle_maker(kind: str, epsilon: float, rho: float) -> Callable[[Problem], Oracle] | None:
    """A function from a problem to the oracle that ``--oracle`` names; None for the problem's own."""
    if kind == "own":
        return None
    if kind == "additive":
        return lambda p: AdditiveError(p.oracle, epsilon)
    if kind == "multiplicative":
        return lambda p: MultiplicativeError(p.oracle, rho)

    def lanczos(problem: Problem) -> Oracle:
        own = problem.oracle
        if not isinstance(own, TraceBall):
            raise ValueError(f"--oracle lanczos needs a trace ball, got {own!r}: choose another --instance")
        return TraceBall(own.delta, (own.shape[0], own.shape[1]), method="lanczos")

    return lanczos
