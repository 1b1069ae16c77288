"""Intervals and tests over seeds: every arm sees the same seeds, so arms are compared in pairs.

All intervals are Student's t over seeds. They show how a result varies with the order of the data and the adapters'
draws on one text and one model, not how it would vary over texts or models.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.05
"""The level of significance, after Holm's correction over all comparisons of a table."""


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence limits, which are NaN for a single value."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the distance between the limits."""
        return (self.high - self.low) / 2

    def signed(self, digits: int) -> str:
        """As a difference, such as ``-0.04 (-0.05 to -0.03)``; without limits where there are none."""
        mean, low, high = (f"{value:+.{digits}f}" for value in (self.mean, self.low, self.high))
        return mean if math.isnan(self.low) else f"{mean} ({low} to {high})"


@dataclass(frozen=True)
class Paired:
    """Arm minus reference: the mean over seeds with its interval, and p of the paired t test, plain and Holm's."""

    difference: Interval
    p: float
    p_holm: float

    def significant(self, level: float = LEVEL) -> bool:
        """Whether the difference is significant at `level` after Holm's correction for the number of comparisons."""
        return self.p_holm < level


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of `values` with its two-sided t interval; NaN limits for a single value.

    Raises:
        ValueError: `values` is empty, or `confidence` is not between 0 and 1.
    """
    if not values:
        raise ValueError("values=[]: an interval needs at least one value")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must lie between 0 and 1, such as 0.95")
    mean = math.fsum(values) / len(values)
    # equals ttest_1samp(values, 0).confidence_interval(), which warns when values are equal, as scores often are
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * deviation(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of a sample (n − 1 in the denominator); NaN for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of `p`, in the same order; NaN (no test) stays NaN and is not counted."""
    tested = sorted((value, index) for index, value in enumerate(p) if not math.isnan(value))
    adjusted = [math.nan] * len(p)
    running = 0.0
    for rank, (value, index) in enumerate(tested):
        running = max(running, min(1.0, (len(tested) - rank) * value))
        adjusted[index] = running
    return adjusted


def paired(
    arms: Mapping[str, Sequence[float]], reference: str | Mapping[str, str], confidence: float = 0.95
) -> dict[str, Paired]:
    """Arms against their references: negative differences mean that the arm's loss is lower.

    Args:
        arms: name -> one value per seed, in the same order of seeds for all.
        reference: the arm that all others are compared with, or arm -> its reference for those that have one.
        confidence: of the intervals, which are not corrected for their number; `p_holm` is.

    Raises:
        KeyError: a reference is not an arm.
        ValueError: an arm and its reference differ in their number of values.
    """
    of = {name: reference for name in arms if name != reference} if isinstance(reference, str) else reference
    for base in {reference} if isinstance(reference, str) else set(of.values()):
        if base not in arms:
            raise KeyError(f"reference={base!r} is not among the arms {list(arms)}")
    for name, base in of.items():
        if len(arms[name]) != len(arms[base]):
            raise ValueError(
                f"arms[{name!r}] has {len(arms[name])} values and {base!r} has {len(arms[base])}: "
                "pairs need the same seeds"
            )
    differences = {name: [a - b for a, b in zip(arms[name], arms[base])] for name, base in of.items()}
    plain = {name: _p_of_zero_mean(values) for name, values in differences.items()}
    adjusted = dict(zip(of, holm([plain[name] for name in of])))
    return {name: Paired(t_interval(differences[name], confidence), plain[name], adjusted[name]) for name in of}


def gap_closed(arm: float, low: float, high: float) -> float:
    """The share of the gap from `low`, LoRA's loss, to `high`, full fine-tuning's, that `arm` closes.

    NaN if full fine-tuning is no better than LoRA: then there is no gap.
    """
    return (low - arm) / (low - high) if high < low else math.nan


def _p_of_zero_mean(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    if len(set(values)) == 1:  # no spread: equal arms, or the same difference for every seed
        return 1.0 if values[0] == 0 else 0.0
    return float(stats.ttest_1samp(values, 0.0).pvalue)
