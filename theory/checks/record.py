"""What must hold of a run: each check can fail, and says by how much it did not.

A verdict is PASS, FAIL or VACUOUS. VACUOUS means that the statement holds and says nothing: a bound above
every gap that was met, or a quantity that cannot be recomputed at this size. The margin is the slack left,
relative to the bound. Tolerances come from rounding alone: ``u`` is the unit roundoff, and each tolerance
says what is rounded. Statements about random draws are judged at a level; see `theory.checks.significance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from theory import theorem
from theory.frank_wolfe import Run
from theory.iterates import DensePoint, Gradient, ObservedMatrix, ObservedPoint, as_array, inner
from theory.oracles import Box, FrobeniusBall, L1Ball, Oracle, Product, RankBall, Simplex, SpectralBall, TraceBall
from theory.step_sizes import TheoremStep

PASS, FAIL, VACUOUS = "PASS", "FAIL", "VACUOUS"
# above this size a dense SVD per snapshot would cost more than the run
DENSE_SVD_LIMIT = 512
# sets of which opposite vertices are D apart
ATTAINING = (L1Ball, Simplex, Box, FrobeniusBall, TraceBall, SpectralBall, RankBall)


@dataclass(frozen=True)
class Check:
    """One statement about one run, or about a group of runs.

    Attributes:
        name: the statement. verdict: PASS, FAIL or VACUOUS.
        margin: slack left, ``(bound - measured) / max(|bound|, |measured|)``; negative where the statement
            fails.
        measured, bound: the two sides. detail: a sentence for the reader.
        level: the probability that the check fails though the statement holds; 0 where nothing is drawn.
    """

    name: str
    verdict: str
    margin: float
    measured: float
    bound: float
    detail: str = ""
    level: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON lines; numbers that are not finite become None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def at_most(
    name: str,
    measured: float,
    bound: float,
    tolerance: float = 0.0,
    *,
    vacuous: bool = False,
    detail: str = "",
    level: float = 0.0,
) -> Check:
    """The statement ``measured <= bound + tolerance``; a statement that is not a number fails."""
    size = max(abs(bound), abs(measured), tolerance, np.finfo(float).tiny)
    margin = (bound + tolerance - measured) / size
    verdict = (VACUOUS if vacuous else PASS) if measured <= bound + tolerance else FAIL
    return Check(name, verdict, float(margin), float(measured), float(bound), detail, level)


def unit(run: Run) -> float:
    """The unit roundoff ``u`` of the run's arithmetic."""
    return float(np.finfo(run.problem.dtype).eps)


def value_rounding(run: Run) -> float:
    """The rounding error of one evaluation of ``L``.

    Pairwise summation of n terms of size at most ``magnitude`` errs by ``u log2(n)`` of it; each term by a
    few u. The iterate itself is rounded when it moves, by u relative, which changes L by u times a
    gradient pairing.
    """
    terms = math.log2(max(2, math.prod(run.oracle.shape))) + 8
    size = run.problem.magnitude if run.problem.magnitude is not None else 0.0
    return unit(run) * terms * (max(size, float(np.abs(run.value).max())) + float(np.abs(run.gap_upper).max()))


def pairing_rounding(run: Run) -> float:
    """The rounding error of one gap: an inner product of ``n`` terms, and an SVD that errs by
    ``max(m, n) u``.

    The gap is a difference, so both errors are relative to its terms, the support and the pairing with ``W_t``.
    """
    size = float(np.max(np.abs(run.support) + np.abs(run.gap_upper) + np.abs(run.descent) + np.abs(run.error)))
    return 32 * max(run.oracle.shape) * unit(run) * size


def identity(run: Run) -> Check:
    """``sum eta (g - eps) = L_1 - L_{T+1} + sum eta^2 c / 2``, divided by ``sum eta``; exact for any run.

    Gap and error are measured by the reference oracle, ``c`` from losses and the descent, so that a gap of
    the wrong sign or of another gradient, or an error left out, breaks it. Only rounding is allowed for.

    As ``c`` takes up whatever the losses leave, a wrong loss or a wrong iterate does not:
    descent, curvature and gradient are there for those.
    """
    total = float(run.eta.sum())
    if total == 0:
        return Check("identity", VACUOUS, 0.0, 0.0, 0.0, "every step was zero")
    left = float(np.sum(run.eta * (run.gap - run.error))) / total
    right = (run.drop + float(np.nansum(run.eta**2 * run.curvature)) / 2) / total
    tolerance = pairing_rounding(run) + 8 * run.T * unit(run) * float(np.abs(run.value).max()) / total
    return at_most("identity", abs(left - right), 0.0, tolerance, detail=f"{left:.6g} = {right:.6g}")


def descent(run: Run) -> Check:
    """``L_{t+1} <= L_t - eta (g - eps) + beta eta^2 |V - W|^2 / 2`` at every step."""
    bound = -run.eta * (run.gap - run.error) + run.problem.beta * run.eta**2 * run.distance2 / 2
    return _every_step("descent", np.diff(run.value) - bound, bound, run)


def reverse_descent(run: Run) -> Check:
    """``L_{t+1} >= L_t - eta (g - eps) - beta eta^2 |V - W|^2 / 2`` at every step."""
    bound = -run.eta * (run.gap - run.error) - run.problem.beta * run.eta**2 * run.distance2 / 2
    return _every_step("reverse descent", bound - np.diff(run.value), bound, run)


def _every_step(name: str, excess: np.ndarray, bound: np.ndarray, run: Run) -> Check:
    worst = int(np.argmax(excess))
    tolerance = 2 * value_rounding(run) + pairing_rounding(run) * float(run.eta.max())
    size = max(abs(float(bound[worst])), tolerance)
    measured = float(excess[worst]) / size
    return at_most(name, measured, 0.0, tolerance / size, detail=f"tightest at t = {worst + 1}")


def curvature(run: Run) -> Check:
    """``|c_t| <= beta |V - W|^2``: the smoothness that the problem claims, seen along the run."""
    tolerance = 2 * value_rounding(run) + pairing_rounding(run) * float(run.eta.max())
    change = np.abs(np.diff(run.value) + run.eta * run.descent)
    allowed = run.problem.beta * run.eta**2 * run.distance2 / 2
    worst = int(np.argmax(change - allowed))
    # steps of which rounding is more than a thousandth part say nothing of the curvature
    told = allowed > 1e3 * tolerance
    ratio = float(np.max(change[told] / allowed[told])) if told.any() else 0.0
    size = max(float(allowed[worst]), tolerance)
    return Check(
        "curvature <= beta",
        (PASS if told.any() else VACUOUS) if change[worst] <= allowed[worst] + tolerance else FAIL,
        float((allowed[worst] + tolerance - change[worst]) / size),
        ratio,
        1.0,
        f"largest |c| / (beta |V - W|^2) = {ratio:.4g}",
    )


def value_range(run: Run) -> Check:
    """``L_1 - min_t L_t <= M``: the suboptimality that ``M`` must bound, seen along the run."""
    seen = float(run.value[0] - run.value.min())
    return at_most("range <= M", seen, run.problem.M, 2 * value_rounding(run))


def _opposite(run: Run, oracle: Oracle) -> float:
    """How far apart an oracle's vertices for a random gradient and its negative are."""
    probe, W, rng = _probe(run, np.random.default_rng(0)), run.problem.start(), np.random.default_rng(0)
    first, second = (oracle(X, at=W, rng=rng).vertex for X in (probe, _negative(probe)))
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return float(np.linalg.norm(first - second))
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return 0.0
    # left and right factors are those of opposite matrices, up to the sign of a singular pair
    cross = float(((first.left.T @ second.left) * (first.right @ second.right.T)).sum())
    return math.sqrt(max(0.0, first.norm2 + second.norm2 - 2 * cross))


def distances(run: Run) -> Check:
    """``|V_t - W_t| <= D``, and the vertices for a gradient and its opposite are no further apart either."""
    seen = max(_opposite(run, run.oracle), math.sqrt(float(run.distance2.max())))
    return at_most("distance <= D", seen, run.oracle.diameter, 64 * run.T * unit(run) * run.oracle.diameter)


def _attains(oracle: Oracle) -> bool:
    """Whether opposite gradients have vertices at distance D, as on norm balls, the box and the simplex."""
    if isinstance(oracle, Product):
        return all(map(_attains, oracle.parts))
    return oracle.exact and isinstance(oracle, ATTAINING)


def diameter(run: Run) -> Check:
    """``D`` is attained: the set's own vertices for a gradient and its opposite are no nearer than ``D``."""
    own, name = run.problem.oracle, "D is attained"
    if not _attains(own):
        return Check(name, VACUOUS, 0.0, math.nan, own.diameter, "not known to be attained by opposite vertices")
    seen, tolerance = _opposite(run, own), 64 * max(own.shape) * unit(run) * own.diameter
    return at_most(name, own.diameter, seen, tolerance, detail=f"opposite vertices are {seen:.6g} apart")


def vertices(run: Run) -> Check:
    """``V_t`` lies in ``K``, asked again at the snapshots of the oracle that the run used."""
    name, set_ = "vertex in K", run.problem.oracle
    points = [W for _, W in run.snapshots]
    if not points or not _small(run) or not all(isinstance(W, DensePoint) for W in points):
        return Check(name, VACUOUS, 0.0, math.nan, 1.0, "no dense snapshots")
    rng, worst = np.random.default_rng(2), 0.0
    for W in points:
        V = run.oracle(run.problem.gradient(W), at=W, rng=rng).vertex
        worst = max(worst, set_.gauge(V if isinstance(V, np.ndarray) else V.dense()))
    return at_most(name, worst, 1.0, 32 * max(set_.shape) * unit(run))


def error_sign(run: Run) -> Check:
    """``eps_t >= 0`` up to the width of the reference: no point of ``K`` pairs below the minimum over ``K``."""
    below = -run.error - (run.gap_upper - run.gap)
    worst = int(np.argmax(below))
    return at_most("error >= 0", float(below[worst]), 0.0, pairing_rounding(run), detail=f"tightest at t = {worst + 1}")


def step_size(run: Run) -> Check:
    """The steps taken are the theorem's, recomputed from ``M, beta, D, T``."""
    assert isinstance(run.step, TheoremStep)
    p = run.problem
    eta = theorem.theorem_step(p.M, p.beta, run.oracle.diameter, run.T, run.step.factor)
    clipped = " (clipped to 1)" if eta == 1.0 else ""
    return at_most(
        "step",
        float(np.abs(run.eta - eta).max()),
        0.0,
        4 * unit(run) * eta,
        detail=f"eta = {eta:.4g}{clipped}",
    )


def oracle_error(run: Run) -> Check:
    """``eps_t`` is at most what the oracle and the gradient estimator admit to.

    ``eps <= epsilon`` for an additive oracle, ``(1 - rho) g`` for a multiplicative one, and ``D |G_t - grad|`` on
    top for an estimated gradient: ``<grad, V - V*> = <grad - G, V - V*> + <G, V - V*>``.
    """
    noise = run.oracle.diameter * run.noise
    seen_gap = run.gap + noise  # the multiplicative oracle is relative to the gap that it sees
    slack = np.zeros(run.T) if run.oracle.exact else run.slack
    admitted = run.oracle.epsilon + (1 - run.oracle.rho) * seen_gap + noise + slack
    worst = int(np.argmax(run.error - admitted))
    return at_most(
        "oracle error",
        float(run.error[worst]),
        float(admitted[worst]),
        pairing_rounding(run),
        detail=f"tightest at t = {worst + 1}; mean error {run.error.mean():.3g}",
    )


def _small(run: Run) -> bool:
    return math.prod(run.oracle.shape) <= DENSE_SVD_LIMIT**2


def gap_sign(run: Run) -> Check:
    """``g_t >= 0``: the gap of a point of ``K`` is never negative."""
    return at_most("gap >= 0", -float(run.gap_upper.min()), 0.0, pairing_rounding(run))


def feasible(run: Run) -> Check:
    """``W_t`` lies in ``K``; T roundings of relative size u may add up."""
    set_ = run.problem.oracle
    points = [W for _, W in run.snapshots] + [run.final]
    tolerance = (3 * run.T + 32 * max(set_.shape)) * unit(run)
    if all(isinstance(W, DensePoint) for W in points) and _small(run):
        return at_most("feasible", max(set_.gauge(W.dense()) for W in points), 1.0, tolerance)
    if isinstance(run.final, ObservedPoint) and isinstance(set_, TraceBall):
        return at_most(
            "feasible",
            run.final.trace_norm_bound() / set_.delta,
            1.0,
            tolerance,
            detail="sum of the atoms' norms",
        )
    return Check("feasible", VACUOUS, 0.0, math.nan, 1.0, "too large for a dense norm")


def dense_gap(run: Run) -> Check:
    """The recorded gap equals ``support(-grad) + <grad, W>``, recomputed from snapshots by the dual norm
    (dense SVD).
    """
    set_, worst, detail, tolerance = run.problem.oracle, 0.0, "", pairing_rounding(run)
    if not _small(run) or not run.snapshots:
        return Check("gap = dense SVD", VACUOUS, 0.0, math.nan, 0.0, "too large for a dense SVD, or no snapshots")
    for t, W in run.snapshots:
        G = run.problem.gradient(W)
        exact = set_.gap(as_array(G), W.dense())
        off = max(run.gap[t - 1] - exact, exact - run.gap_upper[t - 1])
        if off > worst:
            worst, detail = off, f"worst at t = {t}: {run.gap[t - 1]:.6g} against {exact:.6g}"
    return at_most("gap = dense SVD", worst, 0.0, tolerance, detail=detail)


def gradient(run: Run) -> Check:
    """The gradient against differences of the loss, inside ``K``.

    Along ``d = V - W``, smoothness alone gives ``|L(W + h d) - L(W) - h <grad, d>| <= beta h^2 |d|^2 / 2``; with h
    chosen to balance it against the rounding of L, the allowance is derived and nothing else is assumed.
    """
    rng, rounding = np.random.default_rng(1), value_rounding(run)
    worst, allowed, at = -math.inf, 0.0, 0
    for t, W in run.snapshots:
        value, G = run.problem.evaluate(W)
        probe = _probe(run, rng)
        V = run.problem.oracle(probe, at=W, rng=rng).vertex
        distance2 = W.distance2(V)
        if distance2 == 0:
            continue
        h = min(1.0, 2 * math.sqrt(rounding / (run.problem.beta * distance2)))
        moved = W.copy()
        moved.move(V, h)
        slope = (run.problem.value(moved) - value) / h
        off = abs(slope - (inner(G, V) - W.inner(G)))
        bound = run.problem.beta * h * distance2 / 2 + 2 * rounding / h
        if off - bound > worst:
            worst, allowed, at = off - bound, bound, t
    if not run.snapshots or worst == -math.inf:
        return Check("gradient", VACUOUS, 0.0, math.nan, 0.0, "no snapshots")
    return at_most("gradient", worst + allowed, allowed, detail=f"tightest at t = {at}")


def _probe(run: Run, rng: np.random.Generator) -> Gradient:
    """A random gradient of the kind that the problem has; never dense where the problem's are not."""
    if isinstance(run.final, ObservedPoint):
        pattern = run.final.pattern
        return ObservedMatrix(pattern, pattern.native(rng.standard_normal(len(pattern)), run.problem.dtype))
    return rng.standard_normal(run.oracle.shape)


def _negative(G: Gradient) -> Gradient:
    return ObservedMatrix(G.pattern, -G.values) if isinstance(G, ObservedMatrix) else -G


ALWAYS: tuple[Callable[[Run], Check], ...] = (
    identity,
    descent,
    reverse_descent,
    curvature,
    value_range,
    distances,
    diameter,
    vertices,
    error_sign,
    feasible,
    gap_sign,
    dense_gap,
    gradient,
    oracle_error,
)
STRUCTURAL = frozenset(
    {
        "identity",
        "descent",
        "reverse descent",
        "curvature <= beta",
        "range <= M",
        "distance <= D",
        "D is attained",
        "vertex in K",
        "error >= 0",
        "feasible",
        "gap >= 0",
        "gap = dense SVD",
        "gradient",
        "oracle error",
        "step",
    }
)
