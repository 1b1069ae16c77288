"""Each planted error fails the checks named for it; the sound runs pass all checks."""

from functools import cache

import pytest

from tests.theory.checks import mutations
from theory.checks import FAIL, PASS, audit, failures
from theory.checks.record import CHECKS

pytestmark = pytest.mark.numerics

# each of these checks must catch the error by itself
CAUGHT_BY = {
    "flipped_sign": {"identity", "gap = dense SVD"},
    "half_diameter": {"distance <= D"},
    "quarter_beta": {"curvature <= beta", "descent"},
    "quarter_M": {"range <= M"},
    "dropped_epsilon": {"identity", "descent", "sharper: 1.5 s"},
    "silent_epsilon": {"oracle error", "sharper: 1.5 s"},
    "stale_gradient": {"oracle error"},
    "stale_problem": {"gradient", "curvature <= beta"},
    "double_step_rule": {"step"},
    "double_step_taken": {"reverse descent", "curvature <= beta"},
    "vertex_outside": {"vertex in K", "error >= 0", "distance <= D"},
    "double_diameter": {"D is attained"},
    "minibatch_gap": {"gap = dense SVD", "identity"},
}


@cache
def audited(plant):
    return audit(plant())


@pytest.mark.parametrize("plant", mutations.MUTATIONS, ids=lambda f: f.__name__)
def test_planted_error_is_caught(plant):
    caught = {check.name for check in failures(audited(plant))}
    assert CAUGHT_BY[plant.__name__] <= caught, f"caught only by {sorted(caught)}"


@pytest.mark.parametrize("plant", mutations.SOUND, ids=lambda f: f.__name__)
def test_sound_twin_passes(plant):
    checks = audited(plant)
    assert not failures(checks)
    assert sum(check.verdict == PASS for check in checks) >= 14


def test_checks_are_listed_by_name():
    run = mutations.sound()
    assert [check(run).name for check in CHECKS.values()] == list(CHECKS)


def test_margin_is_negative_exactly_where_a_check_fails():
    for plant in [*mutations.SOUND, *mutations.MUTATIONS]:
        for check in audited(plant):
            assert (check.margin < 0) == (check.verdict == FAIL), check
