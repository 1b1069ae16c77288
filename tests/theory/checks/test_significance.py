"""The statistical checks keep their level, and they catch planted errors.

An error that shifts a statistic by at least twice its threshold is missed with a probability of at most `LEVEL`,
the probability of a false alarm.
"""

import math

import numpy as np
import pytest

from tests.theory.checks.broken import anchor, pure_noise
from theory import gradient_estimators
from theory.checks import FAIL, noise, rates
from theory.checks.significance import (
    CHECKS,
    FAMILY,
    LEVEL,
    at_most_hits,
    bernstein,
    binomial,
    chi_squared,
    e_value,
    gaussian_excess,
    normal,
    power,
    share,
)
from theory.frank_wolfe import frank_wolfe
from theory.gradient_estimators import Minibatch
from theory.problems import NoisyProblem
from theory.problems.tight import trace_quadratic
from theory.suite import ladders, tasks

pytestmark = pytest.mark.numerics

REPEATS = 20_000
COARSE = 0.01  # a level at which 20,000 repeats show whether it is kept


def seldom(wrong, level=COARSE):
    """Whether a frequency over the repeats agrees with a probability of at most ``level``, within 5 deviations."""
    return np.mean(wrong) <= level + 5 * math.sqrt(level * (1 - level) / len(wrong))


def often(wrong, level=COARSE):
    return np.mean(wrong) >= level - 5 * math.sqrt(level * (1 - level) / REPEATS)


def test_the_gaussian_thresholds_are_exact():
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((REPEATS, 12))
    low, high = chi_squared(12, COARSE)
    squares = np.mean(draws**2, axis=1)
    together = np.abs(draws).max(axis=1) > normal(1.0, COARSE, tests=12)
    for wrong in (np.abs(draws[:, 0]) > normal(1.0, COARSE), (squares < low) | (squares > high)):
        assert seldom(wrong)
        assert often(wrong)
    assert seldom(together)


def test_counts_keep_their_level():
    rng = np.random.default_rng(2)
    hits = rng.binomial(300, 0.1, (REPEATS, 5))
    low, high = binomial(300, 0.1, COARSE, tests=5)
    assert seldom(((hits < low) | (hits > high)).any(axis=1))
    assert seldom(hits[:, 0] > at_most_hits(300, 0.1, COARSE))


def test_evidence_against_a_mean_of_zero_keeps_its_level_and_adds_up():
    """Biases of 4.5 deviations pass each rung, and four of them together do not, whatever their signs."""
    draws = np.random.default_rng(3).standard_normal((REPEATS, 4))
    assert seldom(np.array([e_value(z) for z in draws[:2000]]) >= 1 / COARSE)
    small = [4.5, -4.5, 4.5, -4.5]
    assert max(np.abs(small)) < normal(1.0)
    assert e_value(small) > 1 / LEVEL
    assert e_value([1e6]) > 1 / LEVEL


def test_the_inequalities_hold():
    rng = np.random.default_rng(1)
    # a rare large value: as far from Gaussian as a population of 50 can be
    population = np.zeros(50)
    population[0] = 1.0
    off = np.abs(rng.choice(population, (REPEATS, 40)).mean(axis=1) - population.mean())
    assert seldom(off > bernstein(population.var(), 1 - population.mean(), 40, COARSE))
    # the norm of a matrix is Lipschitz in its entries
    norms = np.linalg.norm(rng.standard_normal((REPEATS, 4, 3)), 2, axis=(1, 2))
    assert seldom(norms - norms.mean() > gaussian_excess(1.0, COARSE))


def test_levels_add_up_to_the_familys():
    assert share(CHECKS) * CHECKS == pytest.approx(FAMILY)
    assert share(7 * CHECKS) * 7 * CHECKS == pytest.approx(FAMILY)
    assert share(1) == LEVEL
    # the finer the level, the wider each threshold
    for threshold in (normal, gaussian_excess, lambda s, level: bernstein(s * s, 1.0, 100, level)):
        assert threshold(1.0, LEVEL) > threshold(1.0, 100 * LEVEL)


def test_a_named_run_of_many_keeps_to_the_familys_level(tmp_path):
    from theory import fw_gap

    arguments = ["--instance", "F", "--T", *["2"] * 40, "--batch", "1", "--seeds", "1", "--no-plots"]
    tasks = fw_gap.chosen(fw_gap.parser().parse_args(arguments))
    assert tasks[0].run.args[0].keywords["level"] == share(120) < LEVEL


def standardised(repeats=30, T=20):
    """Per repeat and batch size the two-batch and the chi-squared statistic, in standard deviations."""
    problem, out = NoisyProblem(trace_quadratic(6), 1.0), []
    for i in range(repeats):
        for rung in ladders.batch_ladder(problem, T, (1, 64), 2, seed=i):
            checks = {check.name.split(" (")[0]: check for check in rung.checks}
            gap, size = checks["two-batch gap unbiased"], checks["noise = sigma / sqrt(b)"]
            out.append(
                (float(gap.detail.split()[-1]) / gap.bound * normal(1.0), (size.measured - 1) * 6 * math.sqrt(T))
            )
    return np.array(out).reshape(repeats, 2, 2)


def test_the_statistics_are_as_the_thresholds_assume():
    """Over many seeds they have mean 0 and variance 1, within 5 deviations of a Gaussian's."""
    z = standardised()
    n = len(z)
    assert (np.abs(z.mean(axis=0)) <= 5 / math.sqrt(n)).all()
    assert (np.abs(z.var(axis=0) - 1) <= 5 * math.sqrt(2 / n)).all()


def test_an_effect_of_two_thresholds_is_missed_as_rarely_as_a_false_alarm():
    threshold = float(normal(1.0))
    assert 1 - power(2 * threshold, threshold, 1.0) <= LEVEL


# planted errors, and the shift of the statistic in units of its threshold


def effect(check):
    """A shift in units of the threshold, for a check whose bound is the threshold."""
    assert check.verdict == FAIL
    return check.measured / check.bound


@pytest.mark.parametrize("batch", [1, 16, 256, 4096])
def test_scoring_on_the_batch_that_chose_the_vertex_is_seen(batch, monkeypatch):
    """The two-batch estimate with one batch is biased; shown at a hundredth of the suite's size."""
    begin = ladders._Watched.begin

    def one_batch(self, problem, rng):
        estimate = begin(self, problem, rng)

        def both(t, W, G):
            first = estimate(t, W, G)
            self.watch.two_batch[-1] = self.watch.reported[-1]
            return first

        return both

    monkeypatch.setattr(ladders._Watched, "begin", one_batch)
    (rung,) = ladders.batch_ladder(NoisyProblem(trace_quadratic(), 2.0), 40, (batch,), 2)
    check = next(check for check in rung.checks if check.name.startswith("two-batch"))
    assert effect(check) >= 2


@pytest.mark.parametrize("scale", [0.5, 0.97, 1.03, 1.5])
def test_noise_of_another_size_is_seen(scale):
    """With 80,000 degrees of freedom, 40 times fewer than the suite; 3 % in the noise is 6 % in its square."""
    low, high = chi_squared(80_000)
    assert abs(scale**2 - 1) >= 2 * max(high - 1, 1 - low)


def _plain(self, p, rng):
    return Minibatch(self.batch).begin(p, rng)


BEGIN = Minibatch.begin


def _loud(self, p, rng):
    inner = BEGIN(self, p, rng)
    return lambda t, W, G: G + 1.3 * (inner(t, W, G) - G)


@pytest.mark.parametrize(
    "kind, begin, name",
    [
        ("Minibatch", pure_noise, "mean of the estimate"),
        ("Minibatch", _loud, "noise = sigma / sqrt(b)"),
        ("Momentum", pure_noise, "mean of the estimate"),
        ("Momentum", anchor, "mean of the estimate"),
        ("SVRF", anchor, "mean of the estimate"),
        ("SVRF", _plain, "noise = sigma / sqrt(b)"),
        ("SPIDER", anchor, "mean of the estimate"),
        ("SPIDER", _plain, "noise = sigma / sqrt(b)"),
    ],
)
def test_a_broken_estimator_is_seen(kind, begin, name, monkeypatch):
    sound = getattr(gradient_estimators, kind)(16)
    problem = tasks.INSTANCES["tanh"].build(1000, 0)
    run = frank_wolfe(problem, 1000, gradient=sound, snapshots=2)
    assert all(check.verdict != FAIL for check in noise.estimate_checks(run))
    monkeypatch.setattr(getattr(gradient_estimators, kind), "begin", begin)
    checks = {check.name: check for check in noise.estimate_checks(run)}
    assert effect(checks[name]) >= 2


def test_batches_that_do_not_grow_are_seen():
    problem, horizons = NoisyProblem(trace_quadratic(), 2.0), (60, 120, 240, 480)

    def slope(seed):
        runs = [frank_wolfe(problem, T, gradient=Minibatch(64), seed=seed, snapshots=0) for T in horizons]
        return rates.fitted_slope(horizons, [run.average for run in runs])

    slopes = [slope(seed) for seed in range(10)]
    check = rates.rates_check(slopes)
    assert check.verdict == FAIL
    assert "10 outside, 8 allowed" in check.detail
