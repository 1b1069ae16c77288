"""The claims of every problem: gradient, smoothness, M, feasibility of the start, and unbiased batches."""

import math

import numpy as np
import pytest

from theory.checks import FAIL, audit
from theory.frank_wolfe import frank_wolfe
from theory.gradient_estimators import SPIDER, SVRF, FullGradient, Minibatch, Momentum
from theory.iterates import DensePoint, ObservedPoint, as_array
from theory.oracles import (
    AdditiveError,
    Box,
    CappedTraceBall,
    FrobeniusBall,
    L1Ball,
    Product,
    RankBall,
    Simplex,
    SpectralBall,
    TraceBall,
)
from theory.problems import FiniteSum, NoisyProblem, quadratic
from theory.problems.learning import KAPPA, Regression, TwoLayer
from theory.problems.recovery import DenseCompletion, Sensing, low_rank_data, observed_completion
from theory.problems.tight import (
    _bump,
    _ramp,
    cosine,
    cosine_ray,
    simplex_quadratic,
    simplex_well,
    trace_quadratic,
    zero_chain,
)
from theory.step_sizes import STEPS

pytestmark = pytest.mark.numerics


def completion():
    data = low_rank_data(30, 20)
    return DenseCompletion(data.Y, data.delta)


PROBLEMS = {
    "A": cosine,
    "A-ray": cosine_ray,
    "B": lambda: simplex_quadratic(40),
    "B2": lambda: simplex_well(40),
    "F": trace_quadratic,
    "G": lambda: zero_chain(40),
    "completion": completion,
    "observed": lambda: observed_completion(40, 30, 400),
    "sensing": lambda: Sensing(6, 5, 80),
    "tanh": lambda: Regression("tanh", samples=60, inputs=10),
    "sigmoid": lambda: Regression("sigmoid", samples=60, inputs=10, outputs=4),
    "network": lambda: TwoLayer(samples=50),
}
SETS = [
    L1Ball(1.0, 6),
    Simplex(6),
    Box(-1.0, 1.0, 6),
    FrobeniusBall(1.0, (6,)),
    TraceBall(1.0, (3, 2)),
    SpectralBall(1.0, (3, 2)),
    RankBall(1.0, 2, (4, 3)),
    CappedTraceBall(1.0, 2, (4, 3)),
    Product([TraceBall(1.0, (3, 2)), L1Ball(1.0, 4)]),
]


def random_feasible(problem, rng):
    """A point of K, after some steps of the oracle on random gradients."""
    W = problem.start()
    for _ in range(4):
        G = rng.standard_normal(problem.oracle.shape)
        if isinstance(W, ObservedPoint):
            from theory.iterates import ObservedMatrix

            G = ObservedMatrix(W.pattern, W.pattern.entries(G))
        W.move(problem.oracle(G, at=W, rng=rng).vertex, rng.uniform(0.1, 1))
    return W


@pytest.mark.parametrize("name", PROBLEMS)
def test_smoothness_holds_between_random_points_of_the_set(name):
    problem, rng = PROBLEMS[name](), np.random.default_rng(0)
    for _ in range(30):
        W, Z = random_feasible(problem, rng), random_feasible(problem, rng)
        step = np.linalg.norm(W.dense() - Z.dense())
        change = np.linalg.norm(as_array(problem.gradient(W)) - as_array(problem.gradient(Z)))
        assert change <= problem.beta * step * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradient_is_the_derivative(name):
    """Central differences err by h^2/6 of a third derivative; h = 1e-5 leaves that and rounding below 1e-6."""
    problem, rng = PROBLEMS[name](), np.random.default_rng(1)
    W, Z = random_feasible(problem, rng), random_feasible(problem, rng)
    if isinstance(W, ObservedPoint):
        pytest.skip("covered by the audit of a run: its points move only along atoms")
    d, h = Z.dense() - W.dense(), 1e-5
    ahead, behind = (problem.value(DensePoint(W.dense() + sign * h * d)) for sign in (1, -1))
    slope = float(np.sum(problem.gradient(W) * d))
    size = max(1.0, np.linalg.norm(problem.gradient(W)) * np.linalg.norm(d))
    assert (ahead - behind) / (2 * h) == pytest.approx(slope, abs=1e-6 * size)


@pytest.mark.parametrize("name", PROBLEMS)
def test_M_bounds_the_suboptimality_that_descent_finds(name):
    problem = PROBLEMS[name]()
    run = frank_wolfe(problem, 200, STEPS["short"], snapshots=0)
    assert run.value[0] - run.value.min() <= problem.M * (1 + 1e-12)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_no_check_fails_on_any_problem_with_any_step(name, step):
    checks = audit(frank_wolfe(PROBLEMS[name](), 60, STEPS[step], snapshots=3))
    assert [c for c in checks if c.verdict == FAIL] == []


@pytest.mark.parametrize("where", ["interior", "boundary"])
@pytest.mark.parametrize("oracle", SETS, ids=repr)
def test_quadratics_on_every_set(oracle, where):
    """Interior and boundary optima on every set: no check fails, and the short step gets there."""
    rng, centre = np.random.default_rng(4), oracle.start()
    if isinstance(oracle, Simplex):
        centre = np.full(6, 1 / 6)
    d = rng.standard_normal(oracle.shape)
    if isinstance(oracle, Simplex):
        d -= d.mean()
    d *= 0.2 / np.linalg.norm(d)
    target = centre + (d if where == "interior" else 40 * d)
    problem = quadratic(where, oracle, target)
    assert not [c for c in audit(frank_wolfe(problem, 100)) if c.verdict == FAIL]
    run = frank_wolfe(problem, 400, STEPS["short"])
    assert run.gap_upper.min() < 0.05 * max(run.gap[0], 0.1)
    if where == "interior":
        assert run.value[-1] < 1e-2 * run.value[0]


@pytest.mark.parametrize("link", KAPPA)
def test_regression_curvature_constant_is_the_supremum(link):
    """``sup |h'^2 + (h - y) h''|`` over a fine grid of outputs and targets, from above and from below."""
    t = np.linspace(-1, 1, 40_001)
    h, d, d2 = (t, 1 - t**2, -2 * t * (1 - t**2))
    if link == "sigmoid":
        h, d, d2 = (1 + t) / 2, (1 - t**2) / 4, -t * (1 - t**2) / 4
    low, high = (-1, 1) if link == "tanh" else (0, 1)
    seen = max(float(np.abs(d**2 + (h - y) * d2).max()) for y in np.linspace(low, high, 21))
    assert seen <= KAPPA[link] * (1 + 1e-12)
    assert seen == pytest.approx(KAPPA[link], rel=1e-6)


def test_zero_chain_constants_are_certified():
    """152 and 12 n from the extrema of Psi and Phi; second derivatives by differences of the first."""
    x = np.linspace(-6, 6, 1_200_001)
    psi, dpsi = _bump(x)
    phi, dphi = _ramp(x)
    ddpsi, ddphi = np.gradient(dpsi, x), np.gradient(dphi, x)
    sup = {name: float(np.abs(f).max()) for name, f in locals().items() if name in ("psi", "dpsi", "ddpsi", "ddphi")}
    top, slope = math.sqrt(2 * math.pi * math.e), math.sqrt(math.e)
    assert phi.max() <= top
    assert dphi.max() == pytest.approx(slope, rel=1e-9)
    # psi grows towards e and its derivatives decay, so that the interval shows their extrema
    assert sup["psi"] < math.e
    assert sup["ddpsi"] * top + math.e * sup["ddphi"] + 2 * sup["dpsi"] * slope < 152
    assert math.e * top < 12


@pytest.mark.parametrize("name", ["sensing", "tanh", "sigmoid", "network"])
def test_batches_are_unbiased_and_within_sigma(name):
    problem, rng = PROBLEMS[name](), np.random.default_rng(0)
    assert isinstance(problem, FiniteSum)
    W = random_feasible(problem, rng)
    G = problem.gradient(W)
    each = np.array([problem.batch_gradient(W, np.array([i])) for i in range(problem.samples)])
    assert each.mean(axis=0) == pytest.approx(G, abs=1e-12)
    assert math.sqrt(np.mean(np.sum((each - G).reshape(problem.samples, -1) ** 2, axis=1))) <= problem.sigma


def test_noise_has_the_size_it_claims():
    problem = NoisyProblem(trace_quadratic(), 2.0)
    rng, W = np.random.default_rng(0), trace_quadratic().start()
    G = problem.gradient(W)
    for batch in (1, 16):
        noise = [np.sum((problem.batch_gradient(W, problem.draw(rng, batch)) - G) ** 2) for _ in range(300)]
        # a chi-squared mean over 300 x 400 entries is within 3 sqrt(2 / 120000) = 1.2 % of its expectation
        assert np.mean(noise) == pytest.approx(4.0 / batch, rel=0.0125)


ESTIMATORS = [Minibatch(8), Minibatch(lambda t: t), Momentum(4), SVRF(8, 10), SPIDER(8, 10)]


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=lambda e: e.name)
@pytest.mark.parametrize("name", ["sensing", "tanh", "network"])
def test_estimators_pass_every_check(name, gradient):
    run = frank_wolfe(PROBLEMS[name](), 80, gradient=gradient)
    assert not [c for c in audit(run) if c.verdict == FAIL]
    assert run.noise.max() > 0


@pytest.mark.parametrize("gradient", [SVRF(60, 1), SPIDER(60, 1)], ids=lambda e: e.name)
def test_variance_reduction_with_a_period_of_one_is_the_full_gradient(gradient):
    full = frank_wolfe(PROBLEMS["tanh"](), 30, gradient=FullGradient())
    reduced = frank_wolfe(PROBLEMS["tanh"](), 30, gradient=gradient)
    assert np.array_equal(full.value, reduced.value)


def test_variance_reduction_beats_plain_batches():
    problem = PROBLEMS["tanh"]()
    mean = {
        e.name: np.mean([frank_wolfe(problem, 200, gradient=e, seed=s, snapshots=0).noise.mean() for s in range(3)])
        for e in (Minibatch(8), SVRF(8, 20), SPIDER(8, 20))
    }
    assert mean["SPIDER, batch 8"] < mean["SVRF, batch 8"] < mean["batch 8"]


def test_runs_repeat_bit_for_bit_and_leave_the_global_generator_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (frank_wolfe(PROBLEMS["tanh"](), 50, gradient=Minibatch(4), seed=3, snapshots=0) for _ in range(2))
    other = frank_wolfe(PROBLEMS["tanh"](), 50, gradient=Minibatch(4), seed=4, snapshots=0)
    assert np.array_equal(first.value, second.value)
    assert not np.array_equal(first.value, other.value)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_observed_iterate_is_its_dense_twin():
    """The factored run against the same problem with a dense iterate and an observed-entries loss."""
    problem = observed_completion(40, 30, 400)
    run = frank_wolfe(problem, 50, snapshots=0)
    W, pattern = run.final.dense(), problem.pattern
    assert W[pattern.rows, pattern.cols] == pytest.approx(run.final.values, abs=1e-10)
    assert run.final.norm2 == pytest.approx(np.sum(W**2), rel=1e-10)
    assert np.linalg.norm(W, "nuc") <= run.final.trace_norm_bound() * (1 + 1e-12)
    V = problem.oracle(problem.gradient(run.final), at=run.final, rng=np.random.default_rng(0)).vertex
    assert run.final.distance2(V) == pytest.approx(np.sum((V.dense() - W) ** 2), rel=1e-10)


def test_float32_follows_float64():
    double = frank_wolfe(observed_completion(40, 30, 400), 40, snapshots=0)
    single = frank_wolfe(observed_completion(40, 30, 400, dtype=np.float32), 40, snapshots=0)
    assert single.value == pytest.approx(double.value, rel=1e-4)
    assert not [c for c in audit(single) if c.verdict == FAIL]


def test_a_different_oracle_does_not_change_the_batches():
    """Streams are separate: a corrupted oracle with zero error gives the run without it."""
    problem = NoisyProblem(trace_quadratic(), 1.0)
    plain = frank_wolfe(problem, 40, gradient=Minibatch(4))
    wrapped = frank_wolfe(problem, 40, gradient=Minibatch(4), oracle=AdditiveError(problem.oracle, 0.0))
    assert wrapped.value == pytest.approx(plain.value, rel=1e-12)
