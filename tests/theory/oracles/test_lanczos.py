"""The certified interval for the top singular value, compared with dense SVDs on easy, clustered and broken spectra."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.iterates import ObservedMatrix, Pattern, row_blocks
from theory.oracles.lanczos import random_start_excess, top_singular

pytestmark = pytest.mark.numerics


def matrix(m, n, spectrum, seed=0):
    rng = np.random.default_rng(seed)
    k = min(m, n)
    U, V = np.linalg.qr(rng.standard_normal((m, k)))[0], np.linalg.qr(rng.standard_normal((n, k)))[0]
    return (U * spectrum(np.arange(k) / k)) @ V.T


SPECTRA = {
    "geometric": lambda x: 10.0 ** (-4 * x),
    "flat": lambda x: np.ones_like(x),
    "clustered top": lambda x: 1 - 0.01 * x,
    "linear": lambda x: 1 - x,
    "one spike": lambda x: np.where(x == 0, 10.0, 1.0),
}


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
@pytest.mark.parametrize("name", SPECTRA)
def test_interval_holds_the_dense_value(name, shape):
    A = matrix(*shape, SPECTRA[name])
    exact = np.linalg.norm(A, 2)
    for seed in range(5):
        pairs = top_singular(A, rng=np.random.default_rng(seed), tol=1e-2)
        low = float(pairs.u[:, 0] @ A @ pairs.v[0])
        assert low == pytest.approx(pairs.sigma[0], rel=1e-12)
        assert low <= exact * (1 + 1e-13) <= pairs.upper * (1 + 1e-12)
        # the residual bounds the distance to some singular value
        residual = np.linalg.norm(A.T @ pairs.u[:, 0] - pairs.sigma[0] * pairs.v[0])
        assert residual == pytest.approx(pairs.residual, abs=1e-12 * exact)


@pytest.mark.parametrize("name", SPECTRA)
def test_many_steps_close_the_interval(name):
    A = matrix(200, 150, SPECTRA[name])
    pairs = top_singular(A, rng=np.random.default_rng(0), certify_steps=100)
    assert pairs.upper <= 1.02 * np.linalg.norm(A, 2)


def test_leading_triplets_agree_with_svd():
    A = matrix(40, 30, SPECTRA["geometric"])
    pairs = top_singular(A, rng=np.random.default_rng(0), rank=4, tol=1e-10)
    U, sigma, V = np.linalg.svd(A, full_matrices=False)
    assert pairs.sigma == pytest.approx(sigma[:4], rel=1e-9)
    best = (U[:, :4] * sigma[:4]) @ V[:4]
    assert pairs.scaled(pairs.sigma).dense() == pytest.approx(best, abs=1e-8)


@given(m=st.integers(1, 12), n=st.integers(1, 12), rank=st.integers(0, 3), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_low_rank_and_tiny_matrices(m, n, rank, seed):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
    exact = np.linalg.norm(A, 2)
    pairs = top_singular(A, rng=rng, tol=1e-10)
    assert pairs.sigma[0] == pytest.approx(exact, rel=1e-9, abs=1e-12)
    assert exact <= pairs.upper * (1 + 1e-12)
    assert np.linalg.norm(pairs.v[0]) == pytest.approx(1, rel=1e-12)


def test_observed_matrix_gives_the_dense_answer():
    rng = np.random.default_rng(0)
    flat = rng.permutation(40 * 30)[:300]
    pattern = Pattern(flat // 30, flat % 30, (40, 30))
    G = ObservedMatrix(pattern, rng.standard_normal(300))
    sparse = top_singular(G, rng=np.random.default_rng(1), tol=1e-8)
    dense = top_singular(G.toarray(), rng=np.random.default_rng(1), tol=1e-8)
    assert sparse.sigma[0] == pytest.approx(dense.sigma[0], rel=1e-12)
    assert sparse.upper == pytest.approx(dense.upper, rel=1e-6)


def test_blocks_give_the_answer_of_one_pass():
    A = np.random.default_rng(0).standard_normal((900, 700))
    assert len(row_blocks(A)) > 1
    pairs = top_singular(A, rng=np.random.default_rng(1), tol=1e-8, max_steps=200)
    assert pairs.sigma[0] == pytest.approx(np.linalg.norm(A, 2), rel=1e-10)


@pytest.mark.parametrize("name", SPECTRA)
def test_search_in_float32_keeps_the_interval_and_unit_vectors(name, monkeypatch):
    """Large matrices are searched in float32; the interval contains the float64 value, and vertices stay in K."""
    monkeypatch.setattr("theory.oracles.lanczos.SINGLE_BYTES", 0)
    A = matrix(60, 40, SPECTRA[name])
    exact = np.linalg.norm(A, 2)
    for scale in (1.0, 1e-12, 1e-30):
        pairs = top_singular(scale * A, rng=np.random.default_rng(0), tol=1e-3)
        u, v = pairs.u[:, 0], pairs.v[0]
        assert u.dtype == np.float64
        assert np.linalg.norm(u) == pytest.approx(1, abs=1e-14)
        assert np.linalg.norm(v) == pytest.approx(1, abs=1e-14)
        low = float(u @ A @ v)
        assert low == pytest.approx(pairs.sigma[0] / scale, rel=1e-5)
        assert low <= exact * (1 + 1e-14)
        assert exact <= pairs.upper / scale * (1 + 1e-14)


def test_same_generator_same_bits():
    A = matrix(80, 70, SPECTRA["linear"])
    first, second = (top_singular(A, rng=np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(first.u, second.u)
    assert np.array_equal(first.v, second.v)
    assert first.upper == second.upper


def test_warm_starts_lie_and_random_starts_do_not():
    """A start near the second singular vector converges there; the interval of a random start contains sigma_1."""
    A = np.diag([1.0, 0.9, *np.linspace(0.5, 0.1, 48)])
    v = np.eye(50)[1]
    for _ in range(10):
        v = A.T @ (A @ v)
        v /= np.linalg.norm(v)
    assert np.linalg.norm(A @ v) == pytest.approx(0.9)
    assert top_singular(A, rng=np.random.default_rng(0)).sigma[0] == pytest.approx(1.0, rel=1e-3)


def test_random_start_bound_fails_as_rarely_as_it_says():
    """At an allowed failure of 0.1 the bound fails in at most a tenth of the starts, on the worst spectra."""
    n, k, failure, starts = 60, 4, 0.1, 400
    excess = random_start_excess(n, k, failure)
    assert 0 < excess < 1
    rng = np.random.default_rng(0)
    for rest in (1 - excess, 1 - 2 * excess if excess < 0.5 else 0.0, 0.0):
        A = np.diag(np.sqrt(np.concatenate([[1.0], np.linspace(0, rest, n - 1)])))
        ritz = [top_singular(A, rng=rng, tol=1e-16, max_steps=k).sigma[0] for _ in range(starts)]
        wrong = np.mean(np.square(ritz) < 1 - excess)
        assert wrong <= failure + 3 * np.sqrt(failure * (1 - failure) / starts)


def test_random_start_bound_tightens_with_steps_and_loosens_with_size():
    bounds = [random_start_excess(1000, k, 1e-9) for k in (1, 10, 20, 40, 80)]
    assert bounds[0] == 1.0
    assert bounds == sorted(bounds, reverse=True)
    assert random_start_excess(10**6, 40, 1e-9) > random_start_excess(1000, 40, 1e-9)


def test_bad_matrices_are_refused():
    with pytest.raises(ValueError, match="rank must be at most"):
        top_singular(np.ones((3, 2)), rng=np.random.default_rng(0), rank=3)
    with pytest.raises(ValueError, match="A must be finite"):
        top_singular(np.full((3, 2), np.nan), rng=np.random.default_rng(0))
