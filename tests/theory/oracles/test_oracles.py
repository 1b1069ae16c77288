"""Every oracle, compared with brute force over vertices, its dual norm, and random feasible points."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from theory.iterates import DensePoint, LowRank
from theory.oracles import (
    AdditiveError,
    Box,
    CappedTraceBall,
    FrobeniusBall,
    L1Ball,
    MultiplicativeError,
    Product,
    RankBall,
    Simplex,
    SpectralBall,
    TraceBall,
)

pytestmark = pytest.mark.numerics

MATRIX = (4, 3)
SETS = {
    "l1": L1Ball(1.5, 5),
    "simplex": Simplex(5, 2.0),
    "box": Box(-0.5, 2.0, 4),
    "l2": FrobeniusBall(0.7, (5,)),
    "frobenius": FrobeniusBall(0.7, MATRIX),
    "trace": TraceBall(1.3, MATRIX),
    "trace by lanczos": TraceBall(1.3, MATRIX, method="lanczos", tol=1e-9),
    "spectral": SpectralBall(0.9, MATRIX),
    "rank 1": RankBall(1.1, 1, MATRIX),
    "rank 2": RankBall(1.1, 2, MATRIX),
    "rank 3": RankBall(1.1, 3, MATRIX),
    "capped 1": CappedTraceBall(0.8, 1, MATRIX),
    "capped 2": CappedTraceBall(0.8, 2, MATRIX),
    "product": Product([TraceBall(1.0, (3, 2)), L1Ball(2.0, 4), SpectralBall(0.5, (2, 2))]),
    "scion": Product([Product([FrobeniusBall(1.4, (2,))] * 3), SpectralBall(1.0, (2, 2)), Box(-0.5, 0.5, 6)]),
}
# an SVD of a 4 x 3 matrix errs by a few units in the last place of its norm
ULPS = 64 * np.finfo(float).eps
# multiples of 2^-10, so that norms neither overflow nor underflow
entries = st.integers(-4096, 4096).map(lambda k: k / 1024)


def dense(vertex):
    return vertex.dense() if isinstance(vertex, LowRank) else vertex


def ask(oracle, G, at=None):
    point = DensePoint(oracle.start() if at is None else at)
    return oracle(G, at=point, rng=np.random.default_rng(0))


def gradients(oracle):
    return arrays(float, oracle.shape, elements=entries)


def feasible_point(oracle, rng):
    """A random convex combination of the oracle's answers, hence in K if the answers are."""
    weights = rng.dirichlet(np.ones(6))
    return sum(w * dense(ask(oracle, rng.standard_normal(oracle.shape)).vertex) for w in weights)


@pytest.mark.parametrize("name", SETS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_answer_is_feasible_attained_and_optimal(name, data):
    oracle = SETS[name]
    G = data.draw(gradients(oracle))
    answer = ask(oracle, G)
    V = dense(answer.vertex)
    size = max(np.abs(G).sum() * oracle.diameter, 1e-300)
    assert V.shape == oracle.shape
    assert oracle.gauge(V) <= 1 + ULPS
    assert -np.sum(G * V) == pytest.approx(answer.attained, abs=ULPS * size)
    exact = oracle.support(-G)
    # the Gram matrix of the rank ball's reference squares the condition: sqrt(u) where sigma is tiny
    blur = 1e-7 if name.startswith("rank") else ULPS
    # Lanczos stops at a residual of tol: by then the value errs by tol^2 over the spectral gap, at most tol
    low = answer.attained - (1e-8 * size if "lanczos" in name else 0)
    assert low <= exact + blur * size
    assert exact <= max(answer.certified, answer.attained) + blur * size
    if "lanczos" not in name:
        assert answer.attained == pytest.approx(exact, abs=blur * size)


@pytest.mark.parametrize("name", SETS)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_no_feasible_point_beats_the_answer(name, data, seed):
    oracle = SETS[name]
    G, rng = data.draw(gradients(oracle)), np.random.default_rng(seed)
    W = feasible_point(oracle, rng)
    assert oracle.gauge(W) <= 1 + ULPS
    size = np.abs(G).sum() * oracle.diameter
    assert -np.sum(G * W) <= ask(oracle, G).certified + 1e-7 * size
    assert oracle.gap(G, W) >= -1e-7 * size


@pytest.mark.parametrize("name", SETS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_diameter_and_circumradius_hold_and_the_diameter_is_attained(name, seed):
    oracle, rng = SETS[name], np.random.default_rng(seed)
    V, W = feasible_point(oracle, rng), feasible_point(oracle, rng)
    assert np.linalg.norm(V - W) <= oracle.diameter * (1 + ULPS)
    assert oracle.diameter / 2 <= oracle.circumradius * (1 + ULPS)
    G = rng.standard_normal(oracle.shape)
    apart = np.linalg.norm(dense(ask(oracle, G).vertex) - dense(ask(oracle, -G).vertex))
    assert apart == pytest.approx(oracle.diameter, rel=1e-6)


def test_gauge_is_the_polar_of_the_support():
    """``<G, W> <= support(G) gauge(W)`` for symmetric sets, with equality at the oracle's answer."""
    rng = np.random.default_rng(3)
    for name, oracle in SETS.items():
        if name in ("simplex", "box"):
            continue
        for _ in range(20):
            G, W = rng.standard_normal(oracle.shape), rng.standard_normal(oracle.shape)
            assert np.sum(G * W) <= oracle.support(G) * oracle.gauge(W) * (1 + 1e-9), name
        V = dense(ask(oracle, G).vertex)
        assert oracle.gauge(V) == pytest.approx(1, rel=1e-9), name


VERTICES = {
    "l1": [1.5 * sign * e for e in np.eye(5) for sign in (1, -1)],
    "simplex": [2.0 * e for e in np.eye(5)],
    "box": [np.array(corner) for corner in itertools.product((-0.5, 2.0), repeat=4)],
}


@pytest.mark.parametrize("name", VERTICES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_brute_force_over_all_vertices(name, data):
    oracle = SETS[name]
    G = data.draw(gradients(oracle))
    best = min(float(G @ V) for V in VERTICES[name])
    assert float(G @ ask(oracle, G).vertex) == pytest.approx(best, abs=ULPS * np.abs(G).sum() * oracle.diameter)


def test_rank_balls_meet_their_limits():
    """Rank one is the trace ball and full rank the Frobenius ball, in support and in gauge."""
    rng = np.random.default_rng(0)
    one, full = RankBall(1.3, 1, MATRIX), RankBall(1.3, 3, MATRIX)
    capped, spectral = CappedTraceBall(1.3, 1, MATRIX), CappedTraceBall(1.3, 3, MATRIX)
    for _ in range(10):
        X = rng.standard_normal(MATRIX)
        for twin, limit in (
            (one, TraceBall(1.3, MATRIX)),
            (full, FrobeniusBall(1.3, MATRIX)),
            (capped, TraceBall(1.3, MATRIX)),
            (spectral, SpectralBall(1.3, MATRIX)),
        ):
            assert twin.support(X) == pytest.approx(limit.support(X), rel=1e-10)
            assert twin.gauge(X) == pytest.approx(limit.gauge(X), rel=1e-10)


def test_rank_of_the_vertex_is_at_most_r():
    G = np.random.default_rng(1).standard_normal((6, 5))
    for rank in (1, 2, 4):
        for oracle in (RankBall(1.0, rank, (6, 5)), CappedTraceBall(1.0, rank, (6, 5))):
            assert np.linalg.matrix_rank(dense(ask(oracle, G).vertex)) == rank


@pytest.mark.parametrize("name", SETS)
def test_zero_gradient_has_an_answer(name):
    oracle = SETS[name]
    answer = ask(oracle, np.zeros(oracle.shape))
    assert oracle.gauge(dense(answer.vertex)) <= 1 + ULPS
    assert answer.attained == 0 == answer.certified


@pytest.mark.parametrize("adversary", ["away", "stall"])
@pytest.mark.parametrize("name", ["l1", "simplex", "box", "trace", "spectral", "rank 2"])
def test_corrupted_oracles_err_by_exactly_what_they_admit(name, adversary):
    rng, inner = np.random.default_rng(5), SETS[name]
    for _ in range(10):
        G, W = rng.standard_normal(inner.shape), feasible_point(inner, rng)
        gap, best = inner.gap(G, W), -inner.support(-G)
        additive = ask(AdditiveError(inner, 0.05, adversary), G, W)
        missed = np.sum(G * dense(additive.vertex)) - best
        assert missed == pytest.approx(min(0.05, gap) if adversary == "stall" else 0.05, abs=1e-12)
        kept = np.sum(G * (W - dense(ask(MultiplicativeError(inner, 0.3, adversary), G, W).vertex)))
        assert kept == pytest.approx(0.3 * gap, abs=1e-12)
        assert inner.gauge(dense(additive.vertex)) <= 1 + ULPS


def test_product_is_the_sum_of_its_layers():
    oracle, rng = SETS["product"], np.random.default_rng(2)
    G = rng.standard_normal(oracle.shape)
    parts = [part.support(-block) for part, block in zip(oracle.parts, oracle.split(G))]
    assert ask(oracle, G).attained == pytest.approx(sum(parts))
    assert oracle.diameter == pytest.approx(math.sqrt(2.0**2 + 4.0**2 + (2 * 0.5 * math.sqrt(2)) ** 2))
