"""When a check says nothing: the mean does not decide, or no gap exceeds the bound."""

import pytest

from theory.checks import FAIL, PASS, VACUOUS, audit
from theory.checks.check import expected_at_most
from theory.frank_wolfe import frank_wolfe
from theory.problems.learning import Regression

pytestmark = pytest.mark.numerics


def test_expectations_are_judged_by_the_whole_interval():
    assert expected_at_most("x", 1.0, 2.0, 0.1).verdict == PASS
    assert expected_at_most("x", 1.0, 0.3, 0.1).verdict == FAIL
    assert expected_at_most("x", 1.0, 1.05, 0.1).verdict == VACUOUS
    assert expected_at_most("x", 1.0, 0.95, 0.1).verdict == VACUOUS


def test_the_two_sided_law_is_vacuous_where_neither_end_says_anything():
    law = {check.name: check for check in audit(frank_wolfe(Regression("tanh"), 10))}["two-sided law"]
    assert law.verdict == VACUOUS
