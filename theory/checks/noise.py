"""Checks of an estimated gradient: its mean and the size of its noise must match its definition.

The bounds of `theory.checks.bounds` use the noise that a run measured, so they hold for any estimator. The checks
here compare the estimator with its definition, at the level of `theory.checks.significance`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from theory.checks.check import FAIL, PASS, Check, at_most, vacuous
from theory.checks.estimators import estimates
from theory.checks.significance import LEVEL, bernstein, binomial, chi_squared, normal
from theory.frank_wolfe import Run
from theory.gradient_estimators import Minibatch
from theory.iterates import Point, as_array
from theory.problems import FiniteSum, NoisyProblem
from theory.seeds import generator

# enough to see 1.3 times the right noise of plain batches on a finite sum
DRAWS = 4096


def second_estimates(run: Run, draws: int = DRAWS) -> np.ndarray:
    """Independent estimates at the last snapshot, each after one at the first, as a ``(draws, d)`` array."""
    (_, before), (_, after) = run.snapshots[0], run.snapshots[-1]
    first, second = run.problem.gradient(before), run.problem.gradient(after)
    out, rng = [], generator(run.seed, 2)
    for _ in range(draws):
        estimate = run.estimator.begin(run.problem, rng)
        estimate(1, before, first)
        out.append(np.ravel(as_array(estimate(2, after, second))))
    return np.array(out)


@dataclass(frozen=True)
class Definition:
    """The second of two estimates by definition: a constant plus a sum of independent terms.

    Attributes:
        mean: (d,) the expectation.
        variance: (d,) of each entry.
        largest: (d,) bound on the entries of one term less their means; zero for Gaussian terms.
        gaussian: whether the terms are Gaussian.
        square_variance: variance of ``|estimate - mean|^2``.
        square_largest: the largest value of that square.
    """

    mean: np.ndarray
    variance: np.ndarray
    largest: np.ndarray
    gaussian: bool = False
    square_variance: float = math.nan
    square_largest: float = math.nan


def define(run: Run) -> Definition | None:
    """The definition of the run's estimator between its first and last snapshot; None if it is unknown."""
    weights, p = run.estimator.second(), run.problem
    if weights is None or len(run.snapshots) < 2:
        return None
    a, b, c, batch = weights
    before, after = run.snapshots[0][1], run.snapshots[-1][1]
    first, second = (np.ravel(as_array(p.gradient(W))) for W in (before, after))
    mean = (a + b) * first + c * second
    if isinstance(p, NoisyProblem):
        assert p.sigma is not None
        # in a difference on one batch additive noise cancels
        size = 0.0 if a else (b * b + c * c) * p.sigma**2 / (mean.size * batch)
        return Definition(mean, np.full(mean.size, size), np.zeros(mean.size), gaussian=True)
    if not isinstance(p, FiniteSum):
        return None
    old, new = _centred(p, before), _centred(p, after)
    parts = [new - old] if a else [b * old, c * new]
    return _of_terms(mean, [part / batch for part in parts], batch)


def _centred(p: FiniteSum, W: Point) -> np.ndarray:
    """The gradient of each term of a finite sum less their mean, ``(N, d)``."""
    assert p.samples is not None
    each = np.array([np.ravel(p.batch_gradient(W, np.array([i]))) for i in range(p.samples)])
    return each - each.mean(axis=0)


def _of_terms(mean: np.ndarray, parts: Sequence[np.ndarray], batch: int) -> Definition:
    """The moments of a sum of ``batch`` draws from each part, for Bernstein's inequality.

    For independent centred vectors z, ``Var|sum z|^2 = sum (E|z|^4 - (tr C_z)^2 - 2 tr C_z^2) + 2 tr (sum C_z)^2``.
    """
    covariance = np.zeros((mean.size, mean.size))
    own, largest = 0.0, 0.0
    for z in parts:
        C, squares = z.T @ z / len(z), np.sum(z * z, axis=1)
        covariance += batch * C
        own += batch * float(np.mean(squares**2) - np.mean(squares) ** 2 - 2 * np.sum(C * C))
        largest += batch * math.sqrt(float(squares.max()))
    entries = np.max([np.abs(z).max(axis=0) for z in parts], axis=0)
    variance = max(0.0, own + 2 * float(np.sum(covariance**2)))
    return Definition(mean, np.diag(covariance).copy(), entries, False, variance, largest**2)


def _rounding(run: Run, seen: np.ndarray, mean: np.ndarray) -> float:
    """The rounding error of a mean over the draws."""
    size = float(np.abs(seen).max() + np.abs(mean).max())
    return 32 * len(seen) * float(np.finfo(run.problem.dtype).eps) * max(size, np.finfo(float).tiny)


def definition(run: Run, seen: np.ndarray, known: Definition | None, level: float = LEVEL) -> Check:
    """The second of two estimates has the right mean: the gradient there, or for momentum
    ``(1 - r_2) grad_1 + r_2 grad_2``.

    Each entry is judged. The two points are the run's first and last snapshot, so an estimate that stays at the
    first point is off by the change of the gradient.
    """
    name = "mean of the estimate"
    if known is None:
        return vacuous(name, "needs two snapshots and a known estimator")
    draws, entries = seen.shape
    if known.gaussian:
        allowed = normal(np.sqrt(known.variance / draws), level, entries)
    else:
        allowed = bernstein(known.variance, known.largest, draws, level, entries)
    allowed = np.asarray(allowed) + _rounding(run, seen, known.mean)
    off = np.abs(seen.mean(axis=0) - known.mean)
    worst = int(np.argmax(off / allowed))
    detail = f"{draws} draws, {entries} entries"
    return at_most(name, float(off[worst]), float(allowed[worst]), detail=detail, level=level)


def sample_noise(run: Run, seen: np.ndarray, known: Definition | None, level: float = LEVEL) -> Check:
    """The mean square of the noise equals the value from the terms of the finite sum; both sides are judged.

    For plain batches the value is ``mean_i |grad f_i - grad|^2 / b``. For SVRF and SPIDER it is the same of the
    change of the gradients.
    """
    name = "noise = sigma / sqrt(b)"
    if known is None or known.gaussian:
        return vacuous(name, "only for known estimators on a finite sum")
    squares, expected = np.sum((seen - known.mean) ** 2, axis=1), float(known.variance.sum())
    allowed = float(bernstein(known.square_variance, known.square_largest, len(seen), level))
    allowed += _rounding(run, seen, known.mean) ** 2
    detail = f"mean square {squares.mean():.4g}, from the terms {expected:.4g}"
    return at_most(name, abs(float(squares.mean()) - expected), allowed, detail=detail, level=level)


def gaussian_noise(runs: Sequence[Run], batch: int, level: float = LEVEL) -> Check:
    """``sum_t |G_t - grad|^2 m n b / sigma^2`` lies in the chi-squared interval of ``m n T`` degrees per run.

    Noise that is too large fails, and so does noise that is too small.
    """
    p, name = runs[0].problem, f"noise = sigma / sqrt(b) (b = {batch})"
    assert isinstance(p, NoisyProblem)
    assert p.sigma is not None
    squares, entries = sum(float(np.sum(run.noise**2)) for run in runs), math.prod(p.oracle.shape)
    if p.sigma == 0:
        return at_most(name, squares, 0.0, detail="no noise")
    degrees = entries * sum(run.T for run in runs)
    low, high = chi_squared(degrees, level)
    ratio = squares * entries * batch / p.sigma**2 / degrees
    margin = min(ratio - low, high - ratio)
    verdict = PASS if margin >= 0 else FAIL
    detail = f"mean square {ratio:.5f} of sigma^2/b, allowed {low:.5f} to {high:.5f}"
    return Check(name, verdict, margin, ratio, 1.0, detail, level)


def every_term(run: Run, level: float = LEVEL) -> Check:
    """The draws of a finite sum take each of its N terms equally often, and nothing else.

    Each count is binomial, so its interval is exact. With 256 draws per term a term that is never drawn, or drawn
    twice as often as the others, lies outside.
    """
    p = run.problem
    assert isinstance(p, FiniteSum)
    assert p.samples is not None
    draws = 256 * p.samples
    index = np.asarray(p.draw(generator(run.seed, 4), draws))
    wrong = index.size != draws or int(index.min()) < 0 or int(index.max()) >= p.samples
    low, high = binomial(draws, 1 / p.samples, level, p.samples)
    counts = np.bincount(np.clip(index, 0, p.samples - 1), minlength=p.samples)
    worst = int(np.argmax(np.abs(counts - draws / p.samples)))
    margin = -1.0 if wrong else min(float(counts.min()) - low, high - float(counts.max())) * p.samples / draws
    return Check(
        "every term is drawn alike",
        PASS if margin >= 0 else FAIL,
        margin,
        float(counts[worst]),
        draws / p.samples,
        f"term {worst}: {counts[worst]} of {draws} draws, allowed {low} to {high}",
        level,
    )


def noise_bound(run: Run) -> Check:
    """``sigma`` of a finite sum bounds the noise of one draw, computed from all terms at both ends of the run."""
    p = run.problem
    assert isinstance(p, FiniteSum)
    if p.sigma is None or not run.snapshots:
        return vacuous("noise <= sigma", "no sigma is claimed, or no snapshots")
    ends = (run.snapshots[0][1], run.snapshots[-1][1])
    seen = max(math.sqrt(float(np.mean(np.sum(_centred(p, W) ** 2, axis=1)))) for W in ends)
    return at_most("noise <= sigma", seen, p.sigma, 64 * float(np.finfo(p.dtype).eps) * p.sigma)


#: how many of the checks of one run are statements about random draws, at most
STATISTICAL = 3


def estimate_checks(run: Run, level: float = LEVEL) -> list[Check]:
    """The checks of one run's estimated gradient; `STATISTICAL` of them are statements about random draws."""
    known = define(run)
    seen = np.zeros((0, 0)) if known is None else second_estimates(run)
    out = [estimates(run), definition(run, seen, known, level)]
    batch = getattr(run.estimator, "batch", None)
    if isinstance(run.problem, NoisyProblem):
        if isinstance(run.estimator, Minibatch) and isinstance(batch, int):
            out.append(gaussian_noise([run], batch, level))
    elif isinstance(run.problem, FiniteSum):
        out += [sample_noise(run, seen, known, level), every_term(run, level), noise_bound(run)]
    return out
