"""Intervals and paired tests, against values worked by hand and scipy's own."""

import math

import pytest
from scipy import stats

from experiments.report.stats import gap_closed, holm, paired, t_interval


def test_the_interval_of_three_values_by_hand():
    # mean 2, s = 1, n = 3, t(0.975, 2) = 4.302653
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.half_width == pytest.approx(4.302652729911275 / math.sqrt(3), rel=1e-9)
    assert interval.low == pytest.approx(2.0 - interval.half_width)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_the_interval_is_scipys(confidence):
    values = [1.91, 1.93, 1.90, 1.97, 1.94]
    interval = t_interval(values, confidence)
    expected = stats.t.interval(confidence, len(values) - 1, loc=interval.mean, scale=stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected, rel=1e-9)


def test_one_value_has_no_interval():
    interval = t_interval([1.5])
    assert interval.mean == 1.5
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_holm_by_hand():
    # sorted .01 .02 .03 .5, times 4 3 2 1, made monotone: .04 .06 .06 .5
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    adjusted = holm([math.nan, 0.02])
    assert math.isnan(adjusted[0])
    assert adjusted[1] == 0.02


def test_pairs_are_tested_as_scipy_does():
    lora, cola, full = [1.90, 1.95, 1.92], [1.88, 1.94, 1.90], [1.80, 1.86, 1.81]
    result = paired({"lora": lora, "cola": cola, "full": full}, "lora")
    assert list(result) == ["cola", "full"]
    for name, values in (("cola", cola), ("full", full)):
        expected = stats.ttest_rel(values, lora)
        assert result[name].p == pytest.approx(expected.pvalue, rel=1e-9)
        limits = expected.confidence_interval()
        assert (result[name].difference.low, result[name].difference.high) == pytest.approx(limits, rel=1e-9)
    assert result["full"].p_holm == pytest.approx(2 * result["full"].p)
    assert result["full"].significant() == (result["full"].p_holm < 0.05)


def test_pairing_removes_what_the_seeds_share():
    """The spread between seeds is a hundred times the difference, which hardly varies."""
    lora = [1.0, 2.0, 3.0, 4.0]
    cola = [0.990, 1.991, 2.990, 3.989]
    assert paired({"lora": lora, "cola": cola}, "lora")["cola"].significant()
    assert stats.ttest_ind(lora, cola).pvalue > 0.9


def test_equal_arms_are_never_significant():
    assert not paired({"lora": [1.0, 2.0], "same": [1.0, 2.0]}, "lora")["same"].significant()


def test_one_seed_tests_nothing():
    result = paired({"lora": [1.0], "cola": [0.5]}, "lora")["cola"]
    assert math.isnan(result.p)
    assert not result.significant()


def test_the_share_of_the_gap():
    assert gap_closed(1.9, 2.0, 1.8) == pytest.approx(0.5)
    assert gap_closed(2.0, 2.0, 1.8) == 0.0
    assert gap_closed(2.1, 2.0, 1.8) == pytest.approx(-0.5)
    assert math.isnan(gap_closed(1.9, 1.8, 2.0))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: t_interval([]), ValueError, "at least one value"),
        (lambda: t_interval([1.0], 95), ValueError, "confidence=95"),
        (lambda: paired({"a": [1.0]}, "lora"), KeyError, "reference='lora'"),
        (lambda: paired({"lora": [1.0], "a": [1.0, 2.0]}, "lora"), ValueError, "pairs need the same seeds"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
