"""Momentum at a fixed batch: its estimator, the size of its error, and rates that planted errors do not have."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from theory.checks import FAIL, PASS, VACUOUS, failures
from theory.frank_wolfe import frank_wolfe
from theory.gradient_estimators import FixedMomentum, Minibatch
from theory.step_sizes import PowerStep
from theory.suite import momentum
from theory.suite.tasks import momentum_task

pytestmark = pytest.mark.numerics


def test_the_estimator_against_its_recursion():
    """d_1 = g_1, then (1 - a) d + a g, with the draws of a plain batch from the same stream."""
    p, a = momentum.problem("trace"), 0.3
    W = p.start()
    G = p.gradient(W)
    average, plain = (e.begin(p, np.random.default_rng(5)) for e in (FixedMomentum(a), Minibatch(1)))
    expected = None
    for t in (1, 2, 3, 4):
        fresh = plain(t, W, G)
        expected = fresh if expected is None else (1 - a) * expected + a * fresh
        assert average(t, W, G) == pytest.approx(expected, rel=1e-12)
        W.move(np.eye(momentum.ORDER) / momentum.ORDER, 0.5)


def test_the_step():
    assert PowerStep().name == "T^-0.75"
    assert PowerStep(factor=2.0).name == "2 T^-0.75"
    run = frank_wolfe(momentum.problem("trace"), 16, PowerStep(factor=2.0), gradient=FixedMomentum(0.25))
    assert np.all(run.eta == 2 / 8)
    assert np.all(frank_wolfe(momentum.problem("trace"), 1, PowerStep(), gradient=FixedMomentum(1.0)).eta == 1)


@pytest.mark.parametrize("share", [0.0, 1.5, -1])
def test_messages(share):
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got"):
        FixedMomentum(share)


def test_expected_noise_is_the_recursions():
    p, a, T = momentum.problem("spectral"), 0.2, 30
    variances = [1.0]
    for _ in range(T - 1):
        variances.append((1 - a) ** 2 * variances[-1] + a**2)
    assert momentum.expected_noise(p, a, T) == pytest.approx(p.sigma * np.mean(np.sqrt(variances)), rel=1e-12)
    assert momentum.expected_noise(p, 1.0, T) == pytest.approx(p.sigma)


@dataclass(frozen=True)
class Forgetful(FixedMomentum):
    """Claims an average, and returns the newest batch."""

    def begin(self, problem, rng):
        return Minibatch(1).begin(problem, rng)


@dataclass(frozen=True)
class Frozen(FixedMomentum):
    """Keeps the first batch for ever."""

    def begin(self, problem, rng):
        first = []

        def estimate(t, W, G):
            first.append(problem.batch_gradient(W, problem.draw(rng, 1)))
            return first[0]

        return estimate


@pytest.mark.parametrize("planted, verdict", [(FixedMomentum, PASS), (Forgetful, FAIL), (Frozen, FAIL)])
def test_an_average_that_does_not_average_is_caught(planted, verdict):
    p, T = momentum.problem("trace"), 256
    runs = [frank_wolfe(p, T, PowerStep(), gradient=planted(T**-0.5), seed=seed, snapshots=0) for seed in range(2)]
    assert momentum.noise_check(runs).verdict == verdict


def test_slopes_are_told_apart():
    """Half a rate off fails, on either side; the tolerance is that of the bound's own terms."""
    tolerance = momentum.slope_tolerance(momentum.problem("trace"))
    assert 0.03 < tolerance < 0.04
    spread = 0.002 * np.random.default_rng(0).standard_normal(16)
    for slope, falls, stalls in ((-0.25, PASS, FAIL), (-0.1, FAIL, PASS), (-0.4, FAIL, FAIL), (0.0, FAIL, PASS)):
        assert momentum.falls_check(slope + spread, tolerance).verdict == falls
        assert momentum.stalled_check(slope + spread).verdict == stalls
    few = [-0.1] * 3  # chance alone could do that
    assert momentum.falls_check(few, tolerance).verdict == VACUOUS


@pytest.mark.parametrize("name", ["trace", "spectral"])
def test_averages_win_at_once(name):
    """Already at short horizons the averaged runs end lower, and no audited statement fails."""
    p = momentum.problem(name)
    last = {}
    for averaged in (True, False):
        runs = [momentum.momentum_runs(p, averaged, seed, (16, 256))[-1] for seed in range(2)]
        last[averaged] = np.mean([run.average for run in runs])
    assert last[True] < last[False]
    assert math.isfinite(last[True])


@pytest.mark.long
@pytest.mark.parametrize("ball, averaged", [("trace", True), ("spectral", True), ("spectral", False)])
def test_the_rates_of_the_suite(ball, averaged):
    (record,) = momentum_task(ball, averaged, 16)
    assert not failures(record.checks)
    assert record.checks[-1].verdict == PASS
