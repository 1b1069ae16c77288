"""Checks of the record of any run, with any step rule: the identity, descent, feasibility and so on.

Tolerances come from rounding alone; ``u`` is the unit roundoff.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from theory.checks.check import FAIL, PASS, VACUOUS, Check, at_most, vacuous
from theory.frank_wolfe import Run
from theory.iterates import DensePoint, Gradient, LowRank, ObservedMatrix, ObservedPoint, Vertex, as_array, inner
from theory.oracles import Oracle, TraceBall

# above this size a dense SVD per snapshot would cost more than the run
DENSE_SVD_LIMIT = 512


def unit(run: Run) -> float:
    """The unit roundoff ``u`` of the run's arithmetic."""
    return float(np.finfo(run.problem.dtype).eps)


def value_rounding(run: Run) -> float:
    """The rounding error of one evaluation of ``L``.

    Pairwise summation of n terms of size at most ``magnitude`` errs by ``u log2(n)`` times that size, and each
    term by a few u. A move rounds the iterate by u, which changes L by u times a pairing with the gradient.
    """
    terms = math.log2(max(2, math.prod(run.oracle.shape))) + 8
    size = run.problem.magnitude if run.problem.magnitude is not None else 0.0
    return unit(run) * terms * (max(size, float(np.abs(run.value).max())) + float(np.abs(run.gap_upper).max()))


def pairing_rounding(run: Run) -> float:
    """The rounding error of one gap: an inner product of n terms, and an SVD that errs by ``max(m, n) u``.

    The gap is a difference. Both errors are relative to its terms, the support and the pairing with ``W_t``.
    """
    size = float(np.max(np.abs(run.support) + np.abs(run.gap_upper) + np.abs(run.descent) + np.abs(run.error)))
    return 32 * max(run.oracle.shape) * unit(run) * size


def identity(run: Run) -> Check:
    """``sum eta (g - eps) = L_1 - L_{T+1} + sum eta^2 c / 2``, divided by ``sum eta``; exact up to rounding.

    The reference oracle measures gap and error; losses and descent give ``c``. So a gap with the wrong sign or
    of another gradient breaks the identity, and so does a missing error term. A wrong loss or iterate does not,
    because ``c`` absorbs it; the checks of descent, curvature and gradient are there for those.
    """
    total = float(run.eta.sum())
    if total == 0:
        return vacuous("identity", "every step was zero", measured=0.0)
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
    """``|c_t| <= beta |V - W|^2``: the claimed smoothness, along the run."""
    tolerance = 2 * value_rounding(run) + pairing_rounding(run) * float(run.eta.max())
    change = np.abs(np.diff(run.value) + run.eta * run.descent)
    allowed = run.problem.beta * run.eta**2 * run.distance2 / 2
    worst = int(np.argmax(change - allowed))
    # where rounding is more than a thousandth of the step, it says nothing about the curvature
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
    """``L_1 - min_t L_t <= M``: ``M`` bounds the suboptimality, along the run."""
    seen = float(run.value[0] - run.value.min())
    return at_most("range <= M", seen, run.problem.M, 2 * value_rounding(run))


def _opposites(run: Run, oracle: Oracle, pairs: int = 4) -> list[tuple[Vertex, Vertex]]:
    """An oracle's vertices for random gradients and their negatives."""
    W, out = run.problem.start(), []
    for i in range(pairs):
        probe = _probe(run, np.random.default_rng([0, i]))
        # both from one start: Lanczos then finds opposite vertices for opposite gradients
        first, second = (oracle(X, at=W, rng=np.random.default_rng(i)).vertex for X in (probe, _negative(probe)))
        out.append((first, second))
    return out


def _distance(first: Vertex, second: Vertex) -> float:
    """``|first - second|_F``."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        cross = float(((first.left.T @ second.left) * (first.right @ second.right.T)).sum())
        return math.sqrt(max(0.0, first.norm2 + second.norm2 - 2 * cross))
    return float(np.linalg.norm(as_array(first) - as_array(second)))


def distances(run: Run) -> Check:
    """``|V_t - W_t| <= D``, and vertices for opposite gradients are at most ``D`` apart too."""
    seen = max(_distance(*pair) for pair in _opposites(run, run.oracle))
    seen = max(seen, math.sqrt(float(run.distance2.max())))
    return at_most("distance <= D", seen, run.oracle.diameter, 64 * run.T * unit(run) * run.oracle.diameter)


def diameter(run: Run) -> Check:
    """``D`` is attained: of the set's vertices for random gradients, two are ``D`` apart."""
    own = run.problem.oracle
    seen, tolerance = max(_distance(*pair) for pair in _opposites(run, own)), _vertex_rounding(run) * own.diameter
    return at_most("D is attained", own.diameter, seen, tolerance, detail=f"two vertices are {seen:.6g} apart")


def circumradius(run: Run) -> Check:
    """``R`` is attained and holds: of the vertices for random gradients, the furthest lies ``R`` from the centre."""
    own, vertices = run.problem.oracle, [V for pair in _opposites(run, run.problem.oracle) for V in pair]
    if own.centre is None:
        seen = max(math.sqrt(V.norm2) if isinstance(V, LowRank) else float(np.linalg.norm(V)) for V in vertices)
    else:
        seen = max(float(np.linalg.norm(as_array(V) - own.centre)) for V in vertices)
    return at_most(
        "R is attained",
        abs(seen - own.circumradius),
        0.0,
        _vertex_rounding(run) * own.circumradius,
        detail=f"R = {own.circumradius:.6g}, the furthest vertex lies {seen:.6g} from the centre",
    )


def _vertex_rounding(run: Run) -> float:
    """The relative rounding error of a vertex's length."""
    return 64 * max(run.oracle.shape) * unit(run)


def vertices(run: Run) -> Check:
    """``V_t`` lies in ``K``: the run's oracle is called again at the snapshots."""
    name, set_ = "vertex in K", run.problem.oracle
    points = [W for _, W in run.snapshots]
    if not points or not _small(run) or not all(isinstance(W, DensePoint) for W in points):
        return vacuous(name, "no dense snapshots", bound=1.0)
    rng, worst = np.random.default_rng(2), 0.0
    for W in points:
        V = run.oracle(run.problem.gradient(W), at=W, rng=rng).vertex
        worst = max(worst, set_.gauge(as_array(V)))
    return at_most(name, worst, 1.0, 32 * max(set_.shape) * unit(run))


def error_sign(run: Run) -> Check:
    """``eps_t >= 0`` up to the width of the reference: no point of ``K`` goes below the minimum over ``K``."""
    below = -run.error - (run.gap_upper - run.gap)
    worst = int(np.argmax(below))
    return at_most("error >= 0", float(below[worst]), 0.0, pairing_rounding(run), detail=f"tightest at t = {worst + 1}")


def oracle_error(run: Run) -> Check:
    """``eps_t`` is at most the error that the oracle and the gradient estimator admit to.

    That is ``epsilon`` for an additive oracle and ``(1 - rho) g`` for a multiplicative one. An estimated gradient
    adds ``D |G_t - grad|``, because ``<grad, V - V*> = <grad - G, V - V*> + <G, V - V*>``.
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


def error_spent(run: Run) -> Check:
    """An oracle that errs on purpose spends its error: at least ``min(eps, g)``, or ``(1 - rho) g``.

    The adversary *away* has the width of ``K`` to spend, which is at least the gap; the snapshots show it. An
    estimated gradient moves the error and the gap by ``D |G_t - grad|`` at most.
    """
    oracle, name = run.oracle, "error is spent"
    if oracle.epsilon == 0 and oracle.rho == 1:
        return vacuous(name, "the oracle does not err on purpose")
    noise = oracle.diameter * run.noise
    room = np.maximum(0.0, run.gap - noise)
    if getattr(oracle, "adversary", "") == "away" and oracle.rho == 1 and _small(run):
        set_ = run.problem.oracle
        for t, W in run.snapshots:
            G = as_array(run.problem.gradient(W))
            room[t - 1] = max(room[t - 1], set_.support(G) + set_.support(-G) - 2 * noise[t - 1])
    due = np.minimum(oracle.epsilon, room) if oracle.rho == 1 else (1 - oracle.rho) * room
    short = due - noise - run.error
    worst = int(np.argmax(short))
    detail = f"tightest at t = {worst + 1}; mean error {run.error.mean():.3g}, due {due.mean():.3g}"
    return at_most(name, float(short[worst]), 0.0, pairing_rounding(run), detail=detail)


def _small(run: Run) -> bool:
    return math.prod(run.oracle.shape) <= DENSE_SVD_LIMIT**2


def gap_sign(run: Run) -> Check:
    """``g_t >= 0``: the gap of a point of ``K`` is never negative."""
    return at_most("gap >= 0", -float(run.gap_upper.min()), 0.0, pairing_rounding(run))


def feasible(run: Run) -> Check:
    """``W_t`` lies in ``K``, up to T roundings of relative size u."""
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
    return vacuous("feasible", "too large for a dense norm", bound=1.0)


def dense_gap(run: Run) -> Check:
    """The recorded gap equals ``support(-grad) + <grad, W>``, recomputed at the snapshots by a dense SVD."""
    set_, worst, detail, tolerance = run.problem.oracle, 0.0, "", pairing_rounding(run)
    if not _small(run) or not run.snapshots:
        return vacuous("gap = dense SVD", "too large for a dense SVD, or no snapshots")
    for t, W in run.snapshots:
        G = run.problem.gradient(W)
        exact = set_.gap(as_array(G), W.dense())
        off = max(run.gap[t - 1] - exact, exact - run.gap_upper[t - 1])
        if off > worst:
            worst, detail = off, f"worst at t = {t}: {run.gap[t - 1]:.6g} against {exact:.6g}"
    return at_most("gap = dense SVD", worst, 0.0, tolerance, detail=detail)


def gradient(run: Run) -> Check:
    """The gradient agrees with differences of the loss inside ``K``.

    Along ``d = V - W`` smoothness gives ``|L(W + h d) - L(W) - h <grad, d>| <= beta h^2 |d|^2 / 2``. The step h
    balances this against the rounding of L, and the allowance follows from both.
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
        return vacuous("gradient", "no snapshots")
    return at_most("gradient", worst + allowed, allowed, detail=f"tightest at t = {at}")


def _probe(run: Run, rng: np.random.Generator) -> Gradient:
    """A random gradient, dense or observed like those of the problem."""
    if isinstance(run.final, ObservedPoint):
        pattern = run.final.pattern
        return ObservedMatrix(pattern, pattern.native(rng.standard_normal(len(pattern)), run.problem.dtype))
    return rng.standard_normal(run.oracle.shape)


def _negative(G: Gradient) -> Gradient:
    return ObservedMatrix(G.pattern, -G.values) if isinstance(G, ObservedMatrix) else -G


#: the checks of every run, by name
CHECKS: dict[str, Callable[[Run], Check]] = {
    "identity": identity,
    "descent": descent,
    "reverse descent": reverse_descent,
    "curvature <= beta": curvature,
    "range <= M": value_range,
    "distance <= D": distances,
    "D is attained": diameter,
    "R is attained": circumradius,
    "vertex in K": vertices,
    "error >= 0": error_sign,
    "feasible": feasible,
    "gap >= 0": gap_sign,
    "gap = dense SVD": dense_gap,
    "gradient": gradient,
    "oracle error": oracle_error,
    "error is spent": error_spent,
}
STRUCTURAL = CHECKS.keys() | {"step"}
