"""Momentum at a fixed batch: one sample per step, averaged, is enough for a gap that falls as ``T^(-1/4)``.

Let ``d_t = (1 - a) d_{t-1} + a g_t``, where each ``g_t`` has noise of size sigma. Then ``d_t - grad_t = N_t + B_t``.
``N_t`` is the same average of the noise alone: Gaussian, and independent of the trajectory. ``B_t`` is the delay: a
step moves the gradient by at most ``beta eta D``, so ``|B_t| <= beta eta D (1 - a)/a``. Since
``eps_t <= D |d_t - grad_t|``,

    avg g <= M/(eta T) + eta beta D^2/2 + D avg |N_t| + beta eta D^2 (1 - a)/a,

and ``E|N_t|`` is about ``sigma sqrt(a/2)``. With ``a = T^(-1/2)`` and ``eta = T^(-3/4)`` the first term, the noise and
the delay are of order ``T^(-1/4)``, and the second term is smaller. Without momentum, ``a = 1``, the noise is constant.
This is the setting of Muon and Lion (arXiv 2506.04192), whose batches do not grow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from theory.checks.check import FAIL, PASS, VACUOUS, Check, at_most
from theory.checks.rates import fitted_slope
from theory.checks.record import pairing_rounding
from theory.checks.significance import LEVEL, gaussian_excess
from theory.frank_wolfe import Run, frank_wolfe
from theory.gradient_estimators import FixedMomentum
from theory.oracles import SpectralBall, TraceBall
from theory.problems import NoisyProblem, quadratic
from theory.seeds import generator
from theory.step_sizes import PowerStep

HORIZONS = (64, 256, 1024)
ORDER = 10  # of the matrices
STALLED = -0.125
"""Half the rate: a slope above it does not fall at the rate."""


def problem(name: str) -> NoisyProblem:
    """A quadratic from zero on the ``"trace"`` or the ``"spectral"`` ball of radius 1, with noise on its gradients.

    On the trace ball the optimum lies on the boundary, on the spectral ball inside, where every vertex is far away.
    """
    if name == "trace":
        target = np.zeros((ORDER, ORDER))
        target[0, 0], target[1, 1] = 2.0, 1.0
        return NoisyProblem(quadratic("momentum, trace ball", TraceBall(1.0, (ORDER, ORDER)), target), 2.0)
    ball = SpectralBall(1.0, (ORDER, ORDER))
    return NoisyProblem(quadratic("momentum, spectral ball", ball, 0.5 * np.eye(ORDER)), math.sqrt(ORDER))


def run_seeds(seed: int, seeds: int, name: str) -> list[int]:
    """Seeds of independent runs, others for every seed and every name."""
    stream = int.from_bytes(name.encode())
    return [int(generator(seed, stream, i).integers(1 << 53)) for i in range(seeds)]


def momentum_runs(p: NoisyProblem, averaged: bool, seed: int, horizons: Sequence[int] = HORIZONS) -> list[Run]:
    """Separate runs over horizons with one sample per step.

    Args:
        p: the problem. averaged: share ``T^(-1/2)``, or no momentum. seed: of the noise. horizons: T of each run.
    """
    return [
        frank_wolfe(
            p, T, PowerStep(), gradient=FixedMomentum(T**-0.5 if averaged else 1.0), seed=seed, snapshots=2
        )
        for T in horizons
    ]  # fmt: skip


def expected_noise(p: NoisyProblem, share: float, T: int) -> float:
    """Bound on ``E avg |N_t|``: entries of ``N_t`` have the variance ``v_t = (1-a)^2 v_{t-1} + a^2 v_1``."""
    assert p.sigma is not None
    settled = share / (2 - share)
    decay = (1 - share) ** (2 * np.arange(T))
    return p.sigma * float(np.mean(np.sqrt(settled + (1 - settled) * decay)))


def noise_check(runs: Sequence[Run]) -> Check:
    """``avg |d_t - grad_t| <= E avg |N_t| + beta eta D (1 - a)/a``, for runs of one horizon over seeds.

    The mean over steps and seeds of ``|N_t|`` is Lipschitz in the draws. The averaging filter has norm at most 1, and
    the first draw, whose weight is 1, adds at most ``1/sqrt(1 - (1-a)^2)``. The constant is their sum times the size of
    an entry, over the root of the number of steps.
    """
    run = runs[0]
    p, estimator = run.problem, run.estimator
    assert isinstance(p, NoisyProblem)
    assert isinstance(estimator, FixedMomentum)
    assert p.sigma is not None
    a, steps = estimator.share, sum(run.T for run in runs)
    delay = p.beta * float(run.eta.max()) * run.oracle.diameter * (1 - a) / a
    entry = p.sigma / math.sqrt(math.prod(p.oracle.shape))
    lipschitz = entry * (1 + 1 / math.sqrt(1 - (1 - a) ** 2)) / math.sqrt(steps)
    allowed = gaussian_excess(lipschitz) + max(pairing_rounding(run) for run in runs)
    seen = float(np.mean([run.noise.mean() for run in runs]))
    bound = expected_noise(p, a, run.T) + delay
    detail = f"one sample alone: {p.sigma:.3g}"
    return at_most(f"momentum's error (T = {run.T})", seen, bound, allowed, detail=detail, level=LEVEL)


def slope_tolerance(p: NoisyProblem, horizons: Sequence[int] = HORIZONS) -> float:
    """How far a slope may be from -1/4 at these horizons: as far as the slopes of the bound's own terms are.

    The noise starts from one sample, so it falls faster. The delay has the factor ``1 - a``, so it falls more slowly.
    A sum of the terms has a slope between theirs.
    """
    noise = [expected_noise(p, T**-0.5, T) for T in horizons]
    delay = [T**-0.75 * (1 - T**-0.5) / T**-0.5 for T in horizons]
    return max(abs(fitted_slope(horizons, terms) + 0.25) for terms in (noise, delay))


def falls_check(slopes: Sequence[float], tolerance: float) -> Check:
    """At least nine in ten seeds have a slope of ``-1/4 +- tolerance``."""
    off = [abs(slope + 0.25) for slope in slopes]
    return _nine_in_ten("slope -1/4", slopes, sum(x > tolerance for x in off), max(off), tolerance)


def stalled_check(slopes: Sequence[float]) -> Check:
    """At least nine in ten seeds have a slope above -1/8: without momentum the gap does not fall at the rate."""
    below = sum(slope < STALLED for slope in slopes)
    return _nine_in_ten("slope above -1/8", slopes, below, -min(slopes), -STALLED)


def _nine_in_ten(name: str, slopes: Sequence[float], outside: int, measured: float, bound: float) -> Check:
    """The number of seeds outside is binomial; VACUOUS with so few seeds that all of them outside could be chance."""
    n = len(slopes)
    limit = int(stats.binom.isf(LEVEL, n, 0.1))
    verdict = VACUOUS if limit >= n else FAIL if outside > limit else PASS
    detail = f"slopes {min(slopes):.4f} to {max(slopes):.4f} over {n} seeds, {outside} outside, {limit} allowed"
    margin = 0.0 if verdict == VACUOUS else (limit - outside) / n
    return Check(name, verdict, margin, measured, bound, detail, LEVEL)
