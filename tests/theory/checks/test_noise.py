"""Every estimator matches its definition, and the checks of the suite catch broken estimators."""

import numpy as np
import pytest

from tests.theory.checks.broken import anchor, pure_noise
from theory import gradient_estimators
from theory.checks import FAIL, PASS, noise
from theory.frank_wolfe import frank_wolfe
from theory.gradient_estimators import SPIDER, SVRF, Minibatch, Momentum
from theory.iterates import DensePoint
from theory.problems import NoisyProblem
from theory.problems.learning import Regression
from theory.problems.tight import trace_quadratic
from theory.suite import ladders, tasks

pytestmark = pytest.mark.numerics

ESTIMATORS = [Minibatch(8), Minibatch(lambda t: t), Momentum(4), SVRF(8, 10), SPIDER(8, 10)]


def problem():
    return Regression("tanh", samples=60, inputs=10)


class _EveryTerm(Regression):
    """Its batches hold every index once, so a batch estimate has no noise."""

    def draw(self, rng, batch):
        return np.arange(self.samples)


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=lambda e: e.name)
def test_mean_and_noise_are_as_defined(gradient):
    run = frank_wolfe(problem(), 40, gradient=gradient)
    assert {check.verdict for check in noise.estimate_checks(run)} == {PASS}


@pytest.mark.parametrize("gradient", [Minibatch(3), SVRF(3, 10), SPIDER(3, 10)], ids=lambda e: e.name)
def test_with_every_term_in_the_batch_the_estimate_is_the_gradient(gradient):
    run = frank_wolfe(_EveryTerm("tanh", samples=60, inputs=10), 35, gradient=gradient)
    # up to 10 corrections, each a difference of two sums over 60 terms of size below 1
    assert run.noise.max() < 10 * 2 * 60 * np.finfo(float).eps


def test_momentum_is_its_recursion():
    p, rng = problem(), np.random.default_rng(5)
    points = [DensePoint(W) for W in 0.2 * np.random.default_rng(6).standard_normal((6, 10))]
    estimate = Momentum(4).begin(p, np.random.default_rng(5))
    expected = None
    for t, W in enumerate(points, 1):
        fresh = p.batch_gradient(W, p.draw(rng, 4))
        r = (t + 1) ** (-2 / 3)
        expected = fresh if expected is None else (1 - r) * expected + r * fresh
        np.testing.assert_allclose(estimate(t, W, p.gradient(W)), expected, rtol=1e-13, atol=1e-15)


def _heavy(self, p, rng):
    average = None

    def estimate(t, W, G):
        nonlocal average
        fresh, share = p.batch_gradient(W, p.draw(rng, self.batch)), (t + 1) ** -self.power
        average = fresh if average is None else (1 - share) * average + fresh
        return average

    return estimate


@pytest.mark.parametrize(
    "kind, begin",
    [
        ("Minibatch", pure_noise),
        ("Momentum", pure_noise),
        ("SVRF", pure_noise),
        ("SPIDER", pure_noise),
        ("SVRF", anchor),
        ("SPIDER", anchor),
        ("Momentum", _heavy),
    ],
)
def test_the_suite_catches_a_broken_estimator(kind, begin, monkeypatch):
    monkeypatch.setattr(getattr(gradient_estimators, kind), "begin", begin)
    broken = [estimator for estimator in gradient_estimators.ESTIMATORS if type(estimator).__name__ == kind]
    monkeypatch.setattr(tasks, "ESTIMATORS", broken)
    hit = tasks.estimators_task(0)
    assert hit
    assert all(FAIL in {check.verdict for check in record.checks} for record in hit)


@pytest.mark.parametrize(
    "scale",
    [lambda b: 1.5, lambda b: 0.5, lambda b: b**-0.5, lambda b: b**0.5, lambda b: 1.03],
    ids=["x1.5", "x0.5", "extra 1/sqrt(b)", "b ignored", "x1.03"],
)
def test_the_batch_ladder_catches_noise_of_another_size(scale, monkeypatch):
    draw = NoisyProblem.draw
    monkeypatch.setattr(NoisyProblem, "draw", lambda self, rng, b: scale(b) * draw(self, rng, b))
    rung = ladders.batch_ladder(NoisyProblem(trace_quadratic(10), 1.0), 200, (16,), 4)[0]
    failed = [check.name for check in rung.checks if check.verdict == FAIL]
    assert "noise = sigma / sqrt(b) (b = 16)" in failed


def test_without_noise_none_is_recorded():
    rung = ladders.batch_ladder(NoisyProblem(trace_quadratic(10), 0.0), 20, (4,), 2)[0]
    assert next(check for check in rung.checks if check.name.startswith("noise")).verdict == PASS
