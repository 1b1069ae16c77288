"""The definition of every gradient estimator, written out a second time, against the estimates that it gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from theory.checks.check import Check, at_most, vacuous
from theory.frank_wolfe import Run
from theory.gradient_estimators import SPIDER, SVRF, Estimator, FixedMomentum, Minibatch, Momentum
from theory.iterates import DensePoint, Point, as_array
from theory.problems import StochasticProblem
from theory.seeds import generator


def reference(
    estimator: Estimator, p: StochasticProblem, points: Sequence[Point], rng: np.random.Generator
) -> list[np.ndarray] | None:
    """The estimates at the points by definition, each a few lines; None for an estimator that is not known here."""
    out: list[np.ndarray] = []
    for t, W in enumerate(points, start=1):
        if isinstance(estimator, Minibatch):
            size = estimator.batch(t) if callable(estimator.batch) else estimator.batch
            out.append(p.batch_gradient(W, p.draw(rng, size)))
        elif isinstance(estimator, Momentum | FixedMomentum):
            fresh = p.batch_gradient(W, p.draw(rng, estimator.batch))
            r = (t + 1) ** -estimator.power if isinstance(estimator, Momentum) else estimator.share
            out.append(fresh if t == 1 else (1 - r) * out[-1] + r * fresh)
        elif isinstance(estimator, SVRF | SPIDER):
            since = (t - 1) % estimator.period
            if since == 0:
                out.append(as_array(p.gradient(W)))
                continue
            back = since if isinstance(estimator, SVRF) else 1  # to the snapshot, or to the previous point
            B = p.draw(rng, estimator.batch)
            out.append(out[t - 1 - back] + p.batch_gradient(W, B) - p.batch_gradient(points[t - 1 - back], B))
        else:
            return None
    return out


def estimates(run: Run) -> Check:
    """The estimates at t = 1, 2, ... up to one past a restart are those of the definition, on the same draws.

    The points lie on the segment between the run's first and last snapshots.
    """
    name, p = "estimate = its definition", run.problem
    if len(run.snapshots) < 2 or not isinstance(p, StochasticProblem):
        return vacuous(name, "needs two snapshots of a run on batches")
    first, last = run.snapshots[0][1].dense(), run.snapshots[-1][1].dense()
    steps = max(3, getattr(run.estimator, "period", 0) + 2)
    points = [DensePoint(first + i / steps * (last - first)) for i in range(steps)]
    expected = reference(run.estimator, p, points, generator(run.seed, 3))
    if expected is None:
        return vacuous(name, "no definition of this estimator is known here")
    estimate = run.estimator.begin(p, generator(run.seed, 3))
    seen = [as_array(estimate(t, W, p.gradient(W))) for t, W in enumerate(points, start=1)]
    off = [float(np.abs(a - b).max()) for a, b in zip(seen, expected)]
    worst = int(np.argmax(off))
    # each estimate sums three gradients, and an error is carried to the next restart
    size = max(float(np.abs(G).max()) for G in (*seen, *expected))
    tolerance = 16 * steps * float(np.finfo(p.dtype).eps) * size
    return at_most(name, off[worst], 0.0, tolerance, detail=f"worst at t = {worst + 1} of {steps}")
