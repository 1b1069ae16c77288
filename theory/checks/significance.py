"""Thresholds of the statistical checks, so chosen that false alarms are rare.

One run of the command raises a false alarm with probability at most `FAMILY` over all its checks. A union bound
divides this probability: each check has its own level, and the levels add up. Every threshold is exact, or a
proved inequality, at the given level and sample size. None rests on the central limit theorem.

=============  =====================================================================  =================
draws          statement                                                              threshold
=============  =====================================================================  =================
Gaussian       the mean, with known variance                                          `normal`
Gaussian       the sum of squares                                                     `chi_squared`
binary         a count                                                                `binomial`
Gaussian       a Lipschitz function, or a martingale with Gaussian steps, from above  `gaussian_excess`
bounded        the mean, with known variance and range                                `bernstein`
Gaussian       the means of several rungs together, with known variances              `e_value`
=============  =====================================================================  =================
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

FAMILY = 1e-6
"""The probability of a false alarm in one run of the command, over all checks: the family's level."""

CHECKS = 100
"""The number of checks that share `FAMILY`; the standard suite makes a third of them."""

LEVEL = FAMILY / CHECKS


def share(checks: int) -> float:
    """The level per check at which so many checks together keep to `FAMILY`; never above `LEVEL`.

    >>> share(31) == LEVEL, share(10_000) < LEVEL / 99
    (True, True)
    """
    return FAMILY / max(checks, CHECKS)


def normal(deviation: float | np.ndarray, level: float = LEVEL, tests: int = 1) -> float | np.ndarray:
    """How far a Gaussian number may be from its mean, on either side.

    Args:
        deviation: its standard deviation. level: probability that any of the numbers is further away.
        tests: how many numbers share the level.

    >>> round(normal(1.0), 3)
    5.731
    """
    return deviation * float(stats.norm.isf(level / (2 * tests)))


def chi_squared(degrees: int, level: float = LEVEL) -> tuple[float, float]:
    """Between which two values the mean of the squares of standard Gaussian numbers lies.

    >>> [round(x, 3) for x in chi_squared(80_000)]
    [0.972, 1.029]
    """
    return float(stats.chi2.ppf(level / 2, degrees)) / degrees, float(stats.chi2.isf(level / 2, degrees)) / degrees


def binomial(draws: int, chance: float, level: float = LEVEL, tests: int = 1) -> tuple[int, int]:
    """Between which two counts the number of hits in independent draws lies.

    Args:
        draws: their number. chance: of a hit. level: probability that any of the counts lies outside.
        tests: how many counts share the level.

    >>> binomial(102_400, 1 / 400, tests=400)
    (157, 370)
    """
    tail = level / (2 * tests)
    return int(stats.binom.ppf(tail, draws, chance)), int(stats.binom.isf(tail, draws, chance))


def at_most_hits(draws: int, chance: float, level: float = LEVEL) -> int:
    """The number of hits in independent draws that is exceeded with a probability of at most ``level``.

    >>> at_most_hits(16, 0.1), at_most_hits(4, 0.1)
    (11, 4)
    """
    return int(stats.binom.isf(level, draws, chance))


def gaussian_excess(deviation: float, level: float = LEVEL) -> float:
    """How far above its mean a number with tails ``exp(-x^2 / (2 deviation^2))`` may be.

    Such tails belong to a function of independent standard Gaussian numbers with Lipschitz constant ``deviation``.
    They also belong to a martingale whose steps are Gaussian given the past, with variances that sum to at most
    ``deviation^2``.
    """
    return deviation * math.sqrt(2 * math.log(1 / level))


def bernstein(
    variance: float | np.ndarray, largest: float | np.ndarray, draws: int, level: float = LEVEL, tests: int = 1
) -> float | np.ndarray:
    """How far the mean of independent draws may be from its expectation, on either side.

    Bernstein's inequality, ``P(|mean - E| >= u) <= 2 exp(-n u^2 / (2 v + 2 M u / 3))``, solved for u.

    Args:
        variance: ``v`` of one draw.
        largest: ``M``. A draw is a sum of independent terms, and ``M`` bounds each term less its mean.
        draws: ``n``. level: probability that any of the means is further away.
        tests: how many means share the level.
    """
    log = math.log(2 * tests / level)
    linear = largest * log / 3
    return (linear + np.sqrt(linear**2 + 2 * draws * variance * log)) / draws


def e_value(z: Sequence[float], bets: Sequence[float] = (0.5, 1.0, 2.0, 4.0)) -> float:
    """The evidence of several standard Gaussian numbers together against a mean of zero, whatever their signs.

    It is the mean over the bets l of the product over the numbers of ``exp(-l^2/2) cosh(l z)``. Each factor has
    expectation 1, so by Markov's inequality the value reaches ``1 / level`` with a probability of at most ``level``.
    This holds for any number of rungs, also if the next one is chosen after a look at those before it.

    >>> e_value([0.3, -1.2, 0.7]) < 1, e_value([4.0, -4.0, 4.0]) > 1 / 1e-8
    (True, True)
    """
    values = np.abs(np.asarray(z, dtype=float))
    # cosh without overflow: log cosh x = x + log(1 + exp(-2x)) - log 2
    logs = [float(np.sum(b * values + np.log1p(np.exp(-2 * b * values)) - math.log(2) - b * b / 2)) for b in bets]
    return float(np.mean(np.exp(np.minimum(logs, 700.0))))


def power(shift: float, threshold: float, deviation: float) -> float:
    """The probability that a Gaussian statistic exceeds a threshold after a planted error shifted its mean.

    >>> power(10.0, 5.731, 1.0) > 0.99998
    True
    """
    return float(stats.norm.sf(threshold - shift, scale=deviation))
