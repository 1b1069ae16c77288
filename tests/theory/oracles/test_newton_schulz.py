"""Muon's oracle: the polynomial of its iteration bounds where the vertex lies and how much of the support it keeps."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from theory.checks import audit, failures
from theory.frank_wolfe import frank_wolfe
from theory.iterates import DensePoint
from theory.oracles import NewtonSchulzBall, SpectralBall
from theory.oracles.newton_schulz import COEFFICIENTS, newton_schulz
from theory.problems import quadratic

pytestmark = pytest.mark.numerics

TAU, SHAPES = 0.9, [(4, 3), (3, 4), (5, 5), (1, 6)]
LEAST = 0.002  # singular values of at least this share of |G|_F end between 0.68 and 1.2025
LOW, HIGH = 0.68, 1.2025
entries = st.integers(-4096, 4096).map(lambda k: k / 1024)


def mapped(x, steps=5):
    """A singular value after the iteration."""
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        x = a * x + b * x**3 + c * x**5
    return x


def ask(ball, G):
    return ball(G, at=DensePoint(ball.start()), rng=np.random.default_rng(0))


def slack(G):
    """Rounding of five steps whose polynomial has slope at most 3.4445, so 3.4445^5 = 485 times that of an SVD."""
    return 485 * 64 * np.finfo(float).eps * max(1.0, float(np.linalg.norm(G)))


def test_the_bounds_of_the_polynomial():
    """On a grid that no peak escapes: between neighbours the polynomial changes by at most 485 times their distance."""
    grid = np.linspace(0, 1, 2_000_001)
    values, between = mapped(grid), 485 * (grid[1] - grid[0]) / 2
    assert values.max() + between < HIGH
    assert values[grid >= LEAST].min() - between > LOW
    assert values.min() >= 0


@pytest.mark.parametrize("shape", SHAPES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_vertex_value_and_alignment(shape, data):
    G = data.draw(arrays(float, shape, elements=entries))
    exact, free, back = (
        SpectralBall(TAU, shape),
        NewtonSchulzBall(TAU, shape, scaled=False),
        NewtonSchulzBall(TAU, shape),
    )
    sigma = np.linalg.svd(G, compute_uv=False)
    size = np.linalg.norm(sigma)
    kept = mapped(sigma / size) if size else sigma
    off = slack(G)
    outside = ask(free, G)
    # the singular vectors are those of the exact vertex, the singular values those of the polynomial
    assert np.sort(np.linalg.svd(outside.vertex, compute_uv=False))[::-1] == pytest.approx(
        TAU * np.sort(kept)[::-1], abs=off
    )
    assert outside.attained == pytest.approx(TAU * float(sigma @ kept), abs=off * max(1.0, sigma.sum()))
    assert free.gauge(outside.vertex) <= HIGH + off
    inside = ask(back, G)
    assert back.gauge(inside.vertex) <= 1 + off
    assert inside.certified == pytest.approx(exact.support(-G), abs=off)
    assert -np.sum(G * inside.vertex) == pytest.approx(inside.attained, abs=off)
    assert inside.attained <= exact.support(-G) + off
    # rho: what large singular values keep, over the largest that any vertex has
    large = float(sigma[sigma >= LEAST * size].sum())
    assert inside.attained >= TAU * large * LOW / HIGH - off


def test_sizes_are_those_of_the_set():
    exact, back = SpectralBall(TAU, (4, 3)), NewtonSchulzBall(TAU, (4, 3))
    assert (back.diameter, back.circumradius) == (exact.diameter, exact.circumradius) == (
        2 * TAU * math.sqrt(3),
        TAU * math.sqrt(3),
    )  # fmt: skip
    assert not back.exact


def test_scaled_back_it_keeps_three_quarters_and_unscaled_it_lies_outside():
    """The figures of the page: 13 to 20 % outside, rho from 0.70 to 0.84 on flat and on falling spectra."""
    rng, found = np.random.default_rng(0), []
    for power in (None, 0.5, 1.0):
        for n in (64, 256):
            G = rng.standard_normal((n, n))
            if power is not None:
                U, _, Vt = np.linalg.svd(G)
                G = (U * np.arange(1, n + 1.0) ** -power) @ Vt
            free, back = NewtonSchulzBall(1.0, (n, n), scaled=False), NewtonSchulzBall(1.0, (n, n))
            answer = ask(back, G)
            found.append((free.gauge(ask(free, G).vertex) - 1, answer.attained / answer.certified))
    outside, rho = zip(*found)
    assert min(outside) >= 0.125
    assert max(outside) <= 0.2025
    assert 0.70 <= min(rho) <= max(rho) <= 0.85


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_the_iteration_is_that_of_torchs_muon():
    """One step from zero without momentum is the negated factor, in bfloat16: eight binary digits, five steps."""
    for shape in ((6, 6), (4, 9), (9, 4)):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = G.clone()
        torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0).step()
        tall = math.sqrt(max(1.0, shape[0] / shape[1]))
        off = np.linalg.norm(-weight.detach().numpy() / tall - newton_schulz(G.double().numpy()))
        assert off <= 2**-5 * np.linalg.norm(newton_schulz(G.double().numpy()))


@pytest.mark.parametrize("reach", [0.1, 4.0])
def test_a_run_with_muons_oracle_is_audited(reach):
    """In the ball every check passes, at an optimum inside or on the boundary; unscaled, the vertex is caught."""
    d = np.random.default_rng(1).standard_normal((6, 5))
    problem = quadratic("q", SpectralBall(1.0, (6, 5)), reach * d / np.linalg.norm(d))
    run = frank_wolfe(problem, 300, oracle=NewtonSchulzBall(1.0, (6, 5)))
    assert not failures(audit(run))
    outside = frank_wolfe(problem, 300, oracle=NewtonSchulzBall(1.0, (6, 5), scaled=False))
    assert "vertex in K" in {check.name for check in failures(audit(outside))}


def test_the_error_is_a_floor_on_the_boundary_alone():
    """Ten times the steps leave an additive error where it was; inside, it falls with the gradient."""
    d = np.random.default_rng(1).standard_normal((6, 5))
    shrinks = {}
    for reach in (0.1, 4.0):
        problem = quadratic("q", SpectralBall(1.0, (6, 5)), reach * d / np.linalg.norm(d))
        short, long = (frank_wolfe(problem, T, oracle=NewtonSchulzBall(1.0, (6, 5))) for T in (100, 1000))
        shrinks[reach] = float(long.error.mean() / short.error.mean())
    assert shrinks[0.1] < 0.5 < 0.8 < shrinks[4.0]
