"""The verdicts of rates, expectations and bounds: when a check passes, fails, or says nothing."""

import numpy as np
import pytest

from theory import theorem
from theory.checks import FAIL, PASS, VACUOUS, audit, rates
from theory.checks.check import expected_at_most
from theory.frank_wolfe import frank_wolfe
from theory.oracles import L1Ball
from theory.problems import quadratic
from theory.problems.learning import Regression
from theory.problems.tight import cosine, simplex_quadratic, trace_quadratic, zero_chain
from theory.step_sizes import ShortStep

pytestmark = pytest.mark.numerics

HORIZONS = (60, 120, 240, 480)


def rate_runs(build, horizons, step=None):
    """One separate run per horizon, each with the step of that horizon."""
    return [frank_wolfe(build(T), T, step) for T in horizons]


@pytest.mark.parametrize("build", [cosine, lambda: simplex_quadratic(60), trace_quadratic], ids=["A", "B", "F"])
def test_the_rate_is_attained(build):
    runs = rate_runs(lambda T: build(), HORIZONS)
    assert rates.rate_check(runs).verdict == PASS
    # the lower end of the two-sided law is positive at every horizon
    for run in runs:
        p = run.problem
        assert theorem.two_sided(run.drop, p.M, p.beta, run.oracle.diameter, run.T, run.eta[0])[0] > 0


def test_slope_check_rejects_another_rate_and_too_few_horizons():
    fast = rate_runs(lambda T: trace_quadratic(), HORIZONS, ShortStep())
    assert rates.rate_check(fast).verdict == FAIL
    assert rates.rate_check(fast[:3]).verdict == VACUOUS


def test_slope_along_one_run_is_not_the_rate():
    """Along one run the step is fixed and the average falls faster, so a rate needs separate runs."""
    run = frank_wolfe(trace_quadratic(), 480)
    t = np.array(HORIZONS)
    along = rates.fitted_slope(t, (np.cumsum(run.gap) / np.arange(1, 481))[t - 1])
    assert abs(along + 0.5) > 0.1


def test_zero_chain_is_flat_in_units_of_s_and_the_check_can_fail():
    lengths = (25, 50, 100, 200)
    runs = [frank_wolfe(zero_chain(n), n, snapshots=0) for n in lengths]
    assert {check.verdict for check in rates.flatness_check(runs)} == {PASS}
    fast = rate_runs(lambda T: quadratic("q", L1Ball(1.0, 4), np.array([3.0, 0, 0, 0])), HORIZONS)
    assert FAIL in {check.verdict for check in rates.flatness_check(fast)}


def test_slopes_are_counted_and_few_seeds_say_nothing():
    assert rates.rates_check([-0.4]).verdict == VACUOUS
    assert rates.rates_check([-0.5] * 4).verdict == VACUOUS
    assert rates.rates_check([-0.49] * 11 + [-0.4] * 5).verdict == PASS
    assert rates.rates_check([-0.49] * 4 + [-0.4] * 12).verdict == FAIL


def test_expectations_are_judged_by_the_whole_interval():
    assert expected_at_most("x", 1.0, 2.0, 0.1).verdict == PASS
    assert expected_at_most("x", 1.0, 0.3, 0.1).verdict == FAIL
    assert expected_at_most("x", 1.0, 1.05, 0.1).verdict == VACUOUS
    assert expected_at_most("x", 1.0, 0.95, 0.1).verdict == VACUOUS


def test_the_two_sided_law_is_vacuous_where_neither_end_says_anything():
    law = {check.name: check for check in audit(frank_wolfe(Regression("tanh"), 10))}["two-sided law"]
    assert law.verdict == VACUOUS
