"""What must hold of an estimated gradient: its mean, and the size of its noise, against what is known beforehand.

The bounds of `theory.audit` take the noise of a run as it was measured, so they hold for any estimator at all;
here the estimator is held against its definition. Statements over random draws are wrong in one of a thousand cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from theory.checks import FAIL, PASS, VACUOUS, Check, at_most
from theory.frank_wolfe import Run
from theory.gradients import Minibatch, Momentum
from theory.points import as_array
from theory.problems import FiniteSum, NoisyProblem

# one wrong FAIL in a thousand statements that hold; a planted error is many standard errors away
CONFIDENCE = 0.999
DRAWS = 256


def second_estimates(run: Run, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Independent estimates at the last snapshot, each after one at the first, and the true gradients at both.

    Returns:
        ``(draws, d)`` estimates of the second call, and the two gradients as vectors.
    """
    (_, before), (_, after) = run.snapshots[0], run.snapshots[-1]
    first, second = run.problem.gradient(before), run.problem.gradient(after)
    out = []
    for rng in np.random.default_rng([run.seed, 2]).spawn(draws):
        estimate = run.estimator.begin(run.problem, rng)
        estimate(1, before, first)
        out.append(np.ravel(as_array(estimate(2, after, second))))
    return np.array(out), np.ravel(as_array(first)), np.ravel(as_array(second))


def definition(run: Run, draws: int = DRAWS) -> Check:
    """The mean of the second of two estimates is the gradient there, ``(1 - r_2) grad_1 + r_2 grad_2`` for momentum.

    Judged entry by entry by Student's quantile, divided among the entries (Bonferroni). The two points are the run's
    first and last snapshot, so that an estimate which stays at the first one is off by the change of the gradient.
    """
    name = "mean of the estimate"
    if len(run.snapshots) < 2:
        return Check(name, VACUOUS, 0.0, math.nan, 0.0, "needs two snapshots")
    seen, first, second = second_estimates(run, draws)
    expected = second
    if isinstance(run.estimator, Momentum):
        share = 3**-run.estimator.power
        expected = (1 - share) * first + share * second
    quantile = float(stats.t.ppf(1 - (1 - CONFIDENCE) / (2 * expected.size), draws - 1))
    size = float(np.abs(seen).max() + np.abs(expected).max())
    rounding = 32 * draws * float(np.finfo(run.problem.dtype).eps) * max(size, np.finfo(float).tiny)
    off = np.abs(seen.mean(axis=0) - expected)
    allowed = quantile * seen.std(axis=0, ddof=1) / math.sqrt(draws) + rounding
    worst = int(np.argmax(off / allowed))
    return at_most(name, float(off[worst]), float(allowed[worst]), detail=f"{draws} draws, {expected.size} entries")


def sample_noise(run: Run, draws: int = DRAWS) -> Check:
    """``E|G_B - grad|^2 = mean_i |grad f_i - grad|^2 / b`` at the last snapshot of a finite sum, from both sides."""
    name, p, b = "noise = sigma / sqrt(b)", run.problem, getattr(run.estimator, "batch", None)
    if not (isinstance(p, FiniteSum) and isinstance(run.estimator, Minibatch) and isinstance(b, int) and run.snapshots):
        return Check(name, VACUOUS, 0.0, math.nan, 0.0, "only for batches of one size from a finite sum")
    assert p.samples is not None
    W = run.snapshots[-1][1]
    seen, _, G = second_estimates(run, draws)
    each = np.array([np.ravel(p.batch_gradient(W, np.array([i]))) for i in range(p.samples)])
    expected = float(np.mean(np.sum((each - G) ** 2, axis=1))) / b
    squares = np.sum((seen - G) ** 2, axis=1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, draws - 1)) * float(squares.std(ddof=1)) / math.sqrt(draws)
    off = abs(float(squares.mean()) - expected)
    return at_most(name, off, half, detail=f"mean square {squares.mean():.4g}, sigma^2/b = {expected:.4g}")


def gaussian_noise(runs: Sequence[Run], batch: int) -> Check:
    """``sum_t |G_t - grad|^2 m n b / sigma^2`` lies within the chi-squared interval of its ``m n T`` degrees per run.

    Two-sided: noise that is too large and noise that is too small both fail.
    """
    p, name = runs[0].problem, f"noise = sigma / sqrt(b) (b = {batch})"
    assert isinstance(p, NoisyProblem)
    assert p.sigma is not None
    squares, entries = sum(float(np.sum(run.noise**2)) for run in runs), math.prod(p.oracle.shape)
    if p.sigma == 0:
        return at_most(name, squares, 0.0, detail="no noise")
    degrees = entries * sum(run.T for run in runs)
    low, high = (float(x) / degrees for x in stats.chi2.interval(CONFIDENCE, degrees))
    ratio = squares * entries * batch / p.sigma**2 / degrees
    margin = min(ratio - low, high - ratio)
    verdict = PASS if margin >= 0 else FAIL
    detail = f"mean square {ratio:.5f} of sigma^2/b, allowed {low:.5f} to {high:.5f}"
    return Check(name, verdict, margin, ratio, 1.0, detail)


def estimate_checks(run: Run) -> list[Check]:
    """Every check of this module that applies to one run of an estimated gradient."""
    out = [definition(run)]
    batch = getattr(run.estimator, "batch", None)
    if isinstance(run.estimator, Minibatch) and isinstance(batch, int):
        if isinstance(run.problem, NoisyProblem):
            out.append(gaussian_noise([run], batch))
        elif isinstance(run.problem, FiniteSum):
            out.append(sample_noise(run))
    return out


def quieter(reduced: Run, plain: Run) -> Check:
    """The mean noise of a variance-reduced run is below that of plain batches of the same size."""
    seen, bound = float(reduced.noise.mean()), float(plain.noise.mean())
    return at_most("noise below plain batches", seen, bound, detail=f"against {plain.estimator.name}")
