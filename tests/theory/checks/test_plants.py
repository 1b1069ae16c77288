"""Errors planted in one function or constant of the package, each caught by the check that is named for it.

`mutations` plants errors in a run or a problem; here the source itself is wrong, as after a slip of the keyboard.
"""

import math

import numpy as np
import pytest

from tests.theory.checks import mutations
from theory import frank_wolfe as algorithm
from theory import theorem
from theory.checks import audit, failures, noise
from theory.frank_wolfe import frank_wolfe
from theory.gradient_estimators import SPIDER, SVRF, Minibatch, Momentum
from theory.iterates import inner
from theory.oracles import AdditiveError, MultiplicativeError
from theory.oracles.inexact import _Inexact
from theory.problems import FiniteSum, NoisyProblem, quadratic
from theory.problems.instances import SETS
from theory.problems.learning import Regression
from theory.problems.recovery import observed_completion
from theory.problems.tight import cosine, trace_quadratic
from theory.step_sizes import Backtracking, OpenLoop, RootStep, ShortStep

pytestmark = pytest.mark.numerics


def patched(owner, name, value):
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


def plain(step=None, T=60):
    return audit(frank_wolfe(trace_quadratic(8), T, step))


def erring(oracle, T=60):
    problem = trace_quadratic(8)
    return audit(frank_wolfe(problem, T, oracle=oracle(problem.oracle)))


def noisy(step=None, T=400):
    return audit(frank_wolfe(NoisyProblem(trace_quadratic(8), 1.0), T, step, gradient=Minibatch(1)))


def estimated(gradient):
    run = frank_wolfe(Regression("tanh", samples=60, inputs=10), 40, gradient=gradient)
    return noise.estimate_checks(run)


def never_errs(self, G, at, rng, best, error):
    """The erring oracle returns the best vertex."""
    return best


MEASURE = algorithm._Recorder.before


def own_vertex(self, t, W, G, G_t, answer):
    """Between moments known beforehand the gap is scored with the algorithm's own vertex."""
    now = MEASURE(self, t, W, G, G_t, answer)
    T = self.value.size - 1
    if t not in {round(float(x)) for x in (1, *np.geomspace(1, T, 4), T)}:
        gap = W.inner(G) - inner(G, answer.vertex)
        self.arrays["gap"][t - 1] = self.arrays["gap_upper"][t - 1] = gap
        self.arrays["error"][t - 1] = 0.0
    return now


def frozen_share(self, p, rng):
    """Momentum with the share of its second step for ever."""
    kept = []

    def estimate(t, W, G):
        fresh, r = p.batch_gradient(W, p.draw(rng, self.batch)), 3**-self.power
        kept.append(fresh if not kept else (1 - r) * kept[-1] + r * fresh)
        return kept[-1]

    return estimate


def without_restart(kind):
    begin = kind.begin
    return lambda self, p, rng: begin(kind(self.batch, 10**9), p, rng)


def rule(formula):
    """A step rule's ``begin`` that follows another formula of the situation."""
    return lambda self, constants, T: lambda now: formula(now, constants)


def halved(kind):
    begin = kind.begin

    def wrong(self, constants, T):
        right = begin(self, constants, T)
        return lambda now: right(now) / 2

    return wrong


def small_sigma(self, *args, **kwargs):
    REGRESSION(self, *args, **kwargs)
    self.sigma /= 20


def no_shrinking(self, constants, T):
    return BACKTRACKING(Backtracking(shrink=1.0), constants, T)


REGRESSION, BACKTRACKING, STEP = Regression.__init__, Backtracking.begin, theorem.theorem_step

# name: the plant, the checks of a run under it, and the names of those that must fail, each by itself
PLANTS = {
    "an additive oracle that never errs": (
        patched(_Inexact, "_worse", never_errs),
        lambda: erring(lambda K: AdditiveError(K, 0.05)),
        {"error is spent"},
    ),
    "an additive oracle that stalls and never errs": (
        patched(_Inexact, "_worse", never_errs),
        lambda: erring(lambda K: AdditiveError(K, 0.05, "stall")),
        {"error is spent"},
    ),
    "a multiplicative oracle that never errs": (
        patched(_Inexact, "_worse", never_errs),
        lambda: erring(lambda K: MultiplicativeError(K, 0.5, "stall")),
        {"error is spent"},
    ),
    "the gap of the algorithm's own vertex": (
        patched(algorithm._Recorder, "before", own_vertex),
        noisy,
        {"gap = dense SVD"},
    ),
    "momentum's share frozen": (
        patched(Momentum, "begin", frozen_share),
        lambda: estimated(Momentum(4)),
        {"estimate = its definition"},
    ),
    "SVRF never restarts": (
        patched(SVRF, "begin", without_restart(SVRF)),
        lambda: estimated(SVRF(8, 10)),
        {"estimate = its definition"},
    ),
    "SPIDER never restarts": (
        patched(SPIDER, "begin", without_restart(SPIDER)),
        lambda: estimated(SPIDER(8, 10)),
        {"estimate = its definition"},
    ),
    "the short step halved": (patched(ShortStep, "begin", halved(ShortStep)), lambda: plain(ShortStep()), {"step"}),
    "the short step halved, with noise": (
        patched(ShortStep, "begin", halved(ShortStep)),
        lambda: noisy(ShortStep(), 60),
        {"step"},
    ),
    "backtracking halved": (
        patched(Backtracking, "begin", halved(Backtracking)),
        lambda: plain(Backtracking()),
        {"step"},
    ),
    "backtracking never shrinks": (
        patched(Backtracking, "begin", no_shrinking),
        lambda: audit(frank_wolfe(Regression("tanh", samples=60, inputs=10), 60, Backtracking())),
        {"step"},
    ),
    "2/(t+2) as 1/(t+1)": (
        patched(OpenLoop, "begin", rule(lambda now, constants: 1 / now.t)),
        lambda: plain(OpenLoop()),
        {"step"},
    ),
    "1/sqrt(t+1) as 1/(t+1)": (
        patched(RootStep, "begin", rule(lambda now, constants: 1 / now.t)),
        lambda: plain(RootStep()),
        {"step"},
    ),
    "theorem_step doubled": (
        patched(theorem, "theorem_step", lambda *args: min(1.0, 2 * STEP(*args))),
        plain,
        {"step"},
    ),
    "theorem_step without its square root": (
        patched(theorem, "theorem_step", lambda M, beta, D, T, factor=1.0: min(1.0, M / (beta * T) / D)),
        plain,
        {"step"},
    ),
    "the last sample is never drawn": (
        patched(FiniteSum, "draw", lambda self, rng, batch: rng.integers(self.samples - 1, size=batch)),
        lambda: estimated(Minibatch(8)),
        {"every term is drawn alike"},
    ),
    "sigma of a finite sum too small": (
        patched(Regression, "__init__", small_sigma),
        lambda: estimated(Minibatch(8)),
        {"noise <= sigma"},
    ),
    "the first sample is drawn twice as often": (
        patched(FiniteSum, "draw", lambda self, rng, batch: np.maximum(rng.integers(-1, self.samples, size=batch), 0)),
        lambda: estimated(Minibatch(8)),
        {"every term is drawn alike"},
    ),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_is_caught_by_name(name, monkeypatch):
    plant, checks, expected = PLANTS[name]
    assert not expected & {check.name for check in failures(checks())}, "fails without the plant"
    plant(monkeypatch)
    caught = {check.name for check in failures(checks())}
    assert expected <= caught, f"caught only by {sorted(caught)}"


@pytest.mark.parametrize("factor", [1 / 3, 0.999, 1.001, 3])
@pytest.mark.parametrize("constant, name", [("diameter", "D is attained"), ("circumradius", "R is attained")])
@pytest.mark.parametrize("label", SETS)
def test_a_wrong_radius_is_caught_on_every_set(label, constant, name, factor):
    oracle = SETS[label]()
    problem = quadratic(label, oracle, oracle.start() + 0.1)
    assert not failures(audit(frank_wolfe(problem, 3)))
    setattr(oracle, constant, factor * getattr(oracle, constant))
    # a diameter that is too small is exceeded; one that is too large is not attained
    expected = "distance <= D" if constant == "diameter" and factor < 1 else name
    assert expected in {check.name for check in failures(audit(frank_wolfe(problem, 3)))}


def test_the_iterates_that_are_checked_again_are_drawn():
    """Two seeds keep other iterates; the first and the last are always kept, and each t is as likely as any other."""
    first, second = ([t for t, _ in frank_wolfe(cosine(), 300, seed=seed).snapshots] for seed in (0, 1))
    assert first != second
    assert first[0] == second[0] == 1
    assert first[-1] == second[-1] == 300
    counts = np.zeros(60)
    for seed in range(200):
        counts[[t - 1 for t, _ in frank_wolfe(cosine(), 60, snapshots=6, seed=seed).snapshots]] += 1
    # 200 draws at a tenth: 20 +- 4.3, and 58 of them lie within 5 deviations
    assert np.abs(counts[1:-1] - 20).max() < 5 * math.sqrt(200 * 0.1 * 0.9)
    assert mutations.sound().snapshots[-1][0] == mutations.T


def test_the_interval_of_observed_completion_is_narrow():
    """At the default it is a small part of the gap; without certification it is wider than the gap."""
    narrow, wide = (frank_wolfe(observed_completion(120, 100, 3000, **o), 20) for o in ({}, {"certify_steps": 0}))
    assert (narrow.gap_upper < 1.2 * narrow.gap).all()
    assert (wide.gap_upper > 2 * wide.gap).all()
