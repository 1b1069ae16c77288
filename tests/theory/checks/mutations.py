"""The planted errors: ways in which an implementation of Theorem 4.1 can go wrong.

Every mutation takes no argument and returns a run with exactly one error in its record or its problem. The
sound run of the same kind passes all checks; see `test_mutations`.
"""

from dataclasses import replace

import numpy as np

from theory.frank_wolfe import Run, frank_wolfe
from theory.gradient_estimators import Estimator, Minibatch
from theory.iterates import DensePoint, as_array
from theory.oracles import AdditiveError, TraceBall
from theory.problems import NoisyProblem, Problem
from theory.problems.tight import cosine, trace_quadratic
from theory.step_sizes import Step, TheoremStep

T = 400


def sound() -> Run:
    return frank_wolfe(trace_quadratic(), T)


def sound_with_error() -> Run:
    problem = trace_quadratic()
    return frank_wolfe(problem, T, oracle=AdditiveError(problem.oracle, 0.05))


def sound_with_noise() -> Run:
    return frank_wolfe(NoisyProblem(trace_quadratic(), 1.0), T, gradient=Minibatch(16))


def sound_cosine() -> Run:
    return frank_wolfe(cosine(), T)


def flipped_sign() -> Run:
    """The gap as printed in the paper, ``max_V <grad, V - W>``."""
    run = sound()
    outward = run.gap - run.support
    # max_V <grad, V> is the same as max_V <-grad, V> on a symmetric set
    return replace(run, gap=run.support - outward, gap_upper=run.support - outward)


class _HalfDiameter(TraceBall):
    def __init__(self, delta: float, shape: tuple[int, int]):
        super().__init__(delta, shape)
        self.diameter = delta


def half_diameter() -> Run:
    """``D = delta`` instead of ``2 delta``."""
    problem = trace_quadratic()
    problem.oracle = _HalfDiameter(1.0, problem.oracle.shape)
    return frank_wolfe(problem, T)


def quarter_beta() -> Run:
    problem = trace_quadratic()
    problem.beta /= 4
    return frank_wolfe(problem, T)


def quarter_M() -> Run:
    problem = cosine()
    problem.M /= 4
    return frank_wolfe(problem, T)


def dropped_epsilon() -> Run:
    """The oracle errs by 0.05 but claims no error, and so does the record."""
    run = sound_with_error()
    oracle = AdditiveError(run.problem.oracle, 0.0)
    return replace(run, oracle=oracle, error=np.zeros(run.T))


def silent_epsilon() -> Run:
    """The oracle errs by 0.05 but claims no error; the record is honest."""
    run = sound_with_error()
    return replace(run, oracle=AdditiveError(run.problem.oracle, 0.0))


class _Stale(Estimator):
    name, noisy = "full", False

    def begin(self, problem, rng):
        last = []

        def estimate(t, W, G):
            last.append(G)
            return last[-2] if t > 1 else G

        return estimate


def stale_gradient() -> Run:
    """The oracle gets the gradient of the previous step, in an algorithm that claims the full gradient."""
    return frank_wolfe(trace_quadratic(), T, gradient=_Stale())


class _StaleProblem(Problem):
    def __init__(self):
        self.inner = trace_quadratic()
        self.name, self.oracle, self.beta, self.M = "stale", self.inner.oracle, 1.0, self.inner.M
        self.magnitude, self.last = 1.0, None

    def start(self):
        return self.inner.start()

    def evaluate(self, W):
        value, G = self.inner.evaluate(W)
        last, self.last = self.last, G
        return value, (G if last is None else last)

    def value(self, W):
        return self.inner.value(W)


def stale_problem() -> Run:
    """The problem itself returns the gradient of its previous evaluation."""
    return frank_wolfe(_StaleProblem(), T)


class _Twice(Step):
    """Doubles a rule and keeps its name."""

    name = "theorem"

    def begin(self, constants, T):
        rule = TheoremStep().begin(constants, T)
        return lambda now: 2 * rule(now)


def double_step_rule() -> Run:
    """``2 eta`` from a rule that claims to be the theorem's."""
    run = frank_wolfe(trace_quadratic(), T, _Twice())
    return replace(run, step=TheoremStep())


class _FarPoint(DensePoint):
    def move(self, V, eta):
        super().move(V, 2 * eta)


def double_step_taken() -> Run:
    """The record says ``eta``, but the iterate moves by ``2 eta``."""
    problem = trace_quadratic()
    problem.start = lambda: _FarPoint(problem._start)
    return frank_wolfe(problem, T)


class _Keeping(Minibatch):
    def begin(self, problem, rng):
        inner = super().begin(problem, rng)

        def estimate(t, W, G):
            G = inner(t, W, G)
            SEEN.append(problem.oracle.gap(as_array(G), W.dense()))
            return G

        return estimate


SEEN: list[float] = []


def minibatch_gap() -> Run:
    """The gap of the minibatch gradient is reported as the gap."""
    SEEN.clear()
    run = frank_wolfe(NoisyProblem(trace_quadratic(), 1.0), T, gradient=_Keeping(16))
    gap = np.array(SEEN)
    return replace(run, gap=gap, gap_upper=gap)


class _Outside(TraceBall):
    """Its vertices are 1.3 times too long."""

    def __call__(self, G, *, at, rng):
        answer = super().__call__(G, at=at, rng=rng)
        V = answer.vertex if isinstance(answer.vertex, np.ndarray) else answer.vertex.dense()
        return replace(answer, vertex=1.3 * V)


def vertex_outside() -> Run:
    problem = trace_quadratic()
    return frank_wolfe(problem, T, oracle=_Outside(1.0, problem.oracle.shape))


class _TwiceDiameter(TraceBall):
    def __init__(self, delta: float, shape: tuple[int, int]):
        super().__init__(delta, shape)
        self.diameter = 4 * delta


def double_diameter() -> Run:
    """``D = 4 delta`` instead of ``2 delta``."""
    problem = trace_quadratic()
    problem.oracle = _TwiceDiameter(1.0, problem.oracle.shape)
    return frank_wolfe(problem, T)


SOUND = [sound, sound_with_error, sound_with_noise, sound_cosine]
MUTATIONS = [
    flipped_sign,
    half_diameter,
    quarter_beta,
    quarter_M,
    dropped_epsilon,
    silent_epsilon,
    stale_gradient,
    stale_problem,
    double_step_rule,
    double_step_taken,
    minibatch_gap,
    vertex_outside,
    double_diameter,
]
