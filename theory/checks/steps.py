"""The definition of every step rule, written out a second time, against the steps that a run took."""

from __future__ import annotations

import math

import numpy as np

from theory.checks.check import Check, at_most, vacuous
from theory.checks.record import unit
from theory.frank_wolfe import Run
from theory.iterates import inner
from theory.seeds import generator
from theory.step_sizes import Backtracking, OpenLoop, PowerStep, RootStep, ShortStep, TheoremStep

# steps of backtracking that are taken again; its estimate of the curvature has settled by then
AGAIN = 32


def promised_step(run: Run) -> float:
    """``eta = min(1, factor sqrt(M) / (D sqrt(beta T)))``: what the theorem's rule promises, not what was recorded."""
    assert isinstance(run.step, TheoremStep)
    p = run.problem
    return min(1.0, run.step.factor * math.sqrt(p.M) / (run.oracle.diameter * math.sqrt(p.beta * run.T)))


def step_size(run: Run) -> Check:
    """The steps are those of the rule's definition, recomputed from the constants and the record."""
    t = np.arange(1, run.T + 1)
    if isinstance(run.step, TheoremStep):
        expected = np.full(run.T, promised_step(run))
    elif isinstance(run.step, OpenLoop):
        expected = 2 / (t + 1)
    elif isinstance(run.step, RootStep):
        expected = t**-0.5
    elif isinstance(run.step, PowerStep):
        expected = np.full(run.T, min(1.0, run.step.factor * run.T**run.step.power))
    elif isinstance(run.step, ShortStep):
        curvature = run.problem.beta * run.distance2
        slope = np.maximum(run.seen_descent, 0)
        expected = np.minimum(1, np.divide(slope, curvature, out=np.zeros(run.T), where=curvature > 0))
    elif isinstance(run.step, Backtracking):
        expected = _backtracking(run, run.step)
    else:
        return vacuous("step", "no definition of this rule is known here")
    off = np.abs(run.eta[: expected.size] - expected) / np.maximum(expected, np.finfo(float).tiny)
    worst = int(np.argmax(off))
    detail = f"eta = {expected[worst]:.4g} at t = {worst + 1}" + (" (clipped to 1)" if expected[worst] == 1 else "")
    return at_most("step", float(off[worst]), 0.0, 8 * unit(run), detail=detail)


def _backtracking(run: Run, rule: Backtracking) -> np.ndarray:
    """The first steps of a run with backtracking, taken again: the same draws, and the rule as in its paper."""
    p, out = run.problem, np.zeros(min(run.T, AGAIN))
    batches, answers = generator(run.seed).spawn(2)
    estimate, W, lipschitz = run.estimator.begin(p, batches), p.start(), p.beta / 100
    for i in range(out.size):
        value, gradient = p.evaluate(W)
        G = estimate(i + 1, W, gradient)
        V = run.oracle(G, at=W, rng=answers).vertex
        slope, distance2 = W.inner(G) - inner(G, V), W.distance2(V)
        if slope > 0 and distance2 > 0:
            lipschitz = max(lipschitz * rule.shrink, 1e-12 * p.beta)
            while True:
                eta = out[i] = min(1.0, slope / (lipschitz * distance2))
                ahead, model = W.copy(), value - eta * slope + eta**2 * lipschitz * distance2 / 2
                ahead.move(V, eta)
                if lipschitz >= p.beta or p.value(ahead) <= model + rule.slack * abs(value):
                    break
                lipschitz = min(lipschitz * rule.grow, p.beta)
        W.move(V, float(run.eta[i]))
    return out
