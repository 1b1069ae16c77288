"""Statements about groups of runs, at small sizes; each is also shown to fail where it should."""

import math

import numpy as np
import pytest

from theory import theorem
from theory.checks import FAIL, PASS, VACUOUS, audit
from theory.frank_wolfe import frank_wolfe
from theory.gradient_estimators import Minibatch
from theory.oracles import L1Ball
from theory.problems import NoisyProblem, quadratic
from theory.problems.learning import Regression
from theory.problems.tight import cosine, simplex_quadratic, trace_quadratic, zero_chain
from theory.step_sizes import ShortStep
from theory.suite import ladders

pytestmark = pytest.mark.numerics

HORIZONS = (60, 120, 240, 480)


@pytest.mark.parametrize("build", [cosine, lambda: simplex_quadratic(60), trace_quadratic], ids=["A", "B", "F"])
def test_the_rate_is_attained(build):
    runs = ladders.rate_runs(lambda T: build(), HORIZONS)
    assert ladders.rate_check(runs).verdict == PASS
    # the rate is not only bounded: the lower end of the two-sided law is positive at every horizon
    for run in runs:
        p = run.problem
        assert theorem.two_sided(run.drop, p.M, p.beta, run.oracle.diameter, run.T, run.eta[0])[0] > 0


def test_slope_check_rejects_another_rate_and_too_few_horizons():
    fast = ladders.rate_runs(lambda T: trace_quadratic(), HORIZONS, ShortStep())
    assert ladders.rate_check(fast).verdict == FAIL
    assert ladders.rate_check(fast[:3]).verdict == VACUOUS


def test_slope_along_one_run_is_not_the_rate():
    """Along one trajectory the step is fixed and the average falls faster: why separate runs are needed."""
    run = frank_wolfe(trace_quadratic(), 480)
    t = np.array(HORIZONS)
    along = ladders.fitted_slope(t, (np.cumsum(run.gap) / np.arange(1, 481))[t - 1])
    assert abs(along + 0.5) > 0.1


def test_zero_chain_is_flat_in_units_of_s_and_the_check_can_fail():
    lengths = (25, 50, 100, 200)
    runs = [frank_wolfe(zero_chain(n), n, snapshots=0) for n in lengths]
    assert {check.verdict for check in ladders.flatness_check(runs)} == {PASS}
    fast = ladders.rate_runs(lambda T: quadratic("q", L1Ball(1.0, 4), np.array([3.0, 0, 0, 0])), HORIZONS)
    assert FAIL in {check.verdict for check in ladders.flatness_check(fast)}


@pytest.mark.parametrize("adversary", ["away", "stall"])
def test_epsilon_ladder(adversary):
    rungs = ladders.epsilon_ladder(lambda s: trace_quadratic(8, seed=s), 300, (0.0, 0.05, 0.2), range(3), adversary)
    assert all(check.verdict != FAIL for rung in rungs for check in rung.checks)
    means = [rung.average.mean for rung in rungs]
    assert means == sorted(means)
    # at the largest error the bound without eps is false, so the term is needed
    assert means[-1] > 1.5 * rungs[-1].runs[0].scale


@pytest.mark.parametrize("adversary", ["away", "stall"])
def test_rho_ladder_has_no_floor(adversary):
    rungs = ladders.rho_ladder(lambda s: trace_quadratic(8, seed=s), 300, (1.0, 0.5, 0.2), range(3), adversary)
    assert all(check.verdict != FAIL for rung in rungs for check in rung.checks)
    assert rungs[-1].average.mean > 1.5 * rungs[-1].runs[0].scale
    long = ladders.rho_ladder(lambda s: trace_quadratic(8), 4800, (0.2,), [0], adversary)[0]
    assert long.average.mean < 0.4 * rungs[-1].average.mean  # 16 times the steps, a quarter of the gap


def test_batch_ladder_shows_the_bias_and_the_estimate_without_it():
    rungs = ladders.batch_ladder(NoisyProblem(trace_quadratic(10), 1.0), 200, (1, 16, 256), range(4))
    assert all(check.verdict != FAIL for rung in rungs for check in rung.checks)
    bias = [rung.extra["reported"].mean / rung.average.mean for rung in rungs]
    assert bias == sorted(bias, reverse=True)
    assert bias[0] > 2
    assert bias[-1] > 1
    for rung in rungs:
        assert rung.extra["two batches"].low <= rung.average.high


def test_sufficient_batches_keep_the_rate_and_single_samples_do_not():
    problem = NoisyProblem(trace_quadratic(10), 1.0)
    assert ladders.rate_check(ladders.growing_batch_runs(problem, HORIZONS)).verdict == PASS
    single = [frank_wolfe(problem, T, gradient=Minibatch(1), snapshots=0) for T in HORIZONS]
    assert ladders.fitted_slope(HORIZONS, [r.average for r in single]) > -0.47


def test_one_seed_says_nothing_of_an_expected_slope():
    assert ladders.rates_check([-0.4]).verdict == VACUOUS


def test_expectations_are_judged_by_the_whole_interval():
    assert ladders.expected_at_most("x", 1.0, 2.0, 0.1).verdict == PASS
    assert ladders.expected_at_most("x", 1.0, 0.3, 0.1).verdict == FAIL
    assert ladders.expected_at_most("x", 1.0, 1.05, 0.1).verdict == VACUOUS
    assert ladders.expected_at_most("x", 1.0, 0.95, 0.1).verdict == VACUOUS


def test_the_interval_of_a_table_is_students():
    samples = [1.0, 1.1, 0.9, 1.05]
    half = ladders.interval(samples, 0.95).half
    # t quantile 3.1824 at three degrees of freedom
    assert half == pytest.approx(3.1824 * np.std(samples, ddof=1) / 2, rel=1e-4)
    assert math.isclose(ladders.interval([3.0]).half, 0.0)


def test_a_bound_above_every_gap_says_nothing():
    assert ladders.expected_at_most("x", 1.0, 2.0, 0.1, largest=1.5).verdict == VACUOUS
    assert ladders.expected_at_most("x", 1.0, 0.3, 0.1, largest=0.2).verdict == FAIL
    rung = ladders.rho_ladder(lambda s: trace_quadratic(8, seed=s), 300, (0.01,), range(3))[0]
    assert rung.checks[-1].verdict == VACUOUS
    noisy = ladders.batch_ladder(NoisyProblem(trace_quadratic(), 2.0), 300, (1,), range(3))[0]
    check = next(check for check in noisy.checks if check.name.startswith("E avg g <= 1.5 s + noise"))
    assert check.verdict == VACUOUS


def test_the_two_sided_law_is_vacuous_where_neither_end_says_anything():
    law = {check.name: check for check in audit(frank_wolfe(Regression("tanh"), 10))}["two-sided law"]
    assert law.verdict == VACUOUS
