"""The semidefinite worst case agrees with the proved constants, and no instance lies above it."""

import math

import pytest

from theory.checks.worst_case import worst_average_gap
from theory.frank_wolfe import frank_wolfe
from theory.problems.tight import cosine, one_step_worst_case, simplex_quadratic, trace_quadratic
from theory.theorem import FROM_SUBOPTIMALITY

pytest.importorskip("PEPit", reason="PEPit is an extra that only this cross-check needs")

# the solver stops at about 1e-5
SOLVER = 1e-4
TABLE = {1: 1.5, 2: 1.4482, 3: 1.4114, 4: 1.3886, 5: 1.3731, 6: 1.3616}


@pytest.mark.parametrize("T", TABLE)
def test_worst_case_is_below_the_proved_constant_and_attains_it_at_one_step(T):
    worst = worst_average_gap(T)
    assert worst == pytest.approx(TABLE[T], abs=SOLVER)
    assert worst <= FROM_SUBOPTIMALITY + SOLVER


def test_worst_case_is_attained_by_the_one_step_instance():
    run = frank_wolfe(one_step_worst_case(1.5), 1)
    assert worst_average_gap(1) == pytest.approx(run.average / run.scale, abs=SOLVER)


@pytest.mark.parametrize("build", [cosine, lambda: simplex_quadratic(10), lambda: trace_quadratic(5)])
def test_no_instance_lies_above_the_worst_case(build):
    problem = build()
    run = frank_wolfe(problem, 4)
    worst = worst_average_gap(4, problem.M, problem.beta, problem.oracle.diameter)
    assert run.average / run.scale <= worst + SOLVER


def test_larger_step_is_within_its_bound():
    assert worst_average_gap(4, factor=math.sqrt(2)) <= math.sqrt(2) + SOLVER
