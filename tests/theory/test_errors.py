"""Messages for bad input: each names the argument, shows the value and asks for a better one."""

import math

import numpy as np
import pytest

from theory import theorem
from theory.frank_wolfe import frank_wolfe
from theory.gradient_estimators import SPIDER, Minibatch
from theory.iterates import DensePoint, ObservedPoint, Pattern
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
from theory.problems import DenseProblem, NoisyProblem, quadratic
from theory.problems.learning import Regression
from theory.problems.recovery import observed_completion
from theory.problems.tight import cosine, trace_quadratic, zero_chain
from theory.step_sizes import TheoremStep

BALL = L1Ball(1.0, 3)


def problem(**changes):
    arguments = {"beta": 1.0, "M": 1.0, **changes}
    return DenseProblem("p", BALL, lambda w: float(w @ w), lambda w: 2 * w, **arguments)


BAD = {
    "trace delta": (lambda: TraceBall(-1.0, (2, 2)), r"delta .* got -1\.0: give the trace-norm radius"),
    "trace delta type": (lambda: TraceBall("one", (2, 2)), r"delta .* got 'one'"),
    "trace delta nan": (lambda: L1Ball(math.nan, 2), r"delta .* got nan"),
    "shape": (lambda: TraceBall(1.0, (2,)), r"shape must be a pair .* got \(2,\)"),
    "shape size": (lambda: SpectralBall(1.0, (0, 2)), r"shape\[0\] .* got 0"),
    "method": (lambda: TraceBall(1.0, (2, 2), method="power"), r"method .* got 'power': pick one"),
    "tol": (lambda: TraceBall(1.0, (2, 2), tol=0.0), r"tol .* got 0\.0: give the relative residual"),
    "rank": (lambda: RankBall(1.0, 3, (2, 5)), r"rank must be at most min\(m, n\) = 2, got 3"),
    "rank zero": (lambda: CappedTraceBall(1.0, 0, (2, 2)), r"rank .* at least 1, got 0"),
    "tau": (lambda: CappedTraceBall(0.0, 1, (2, 2)), r"tau .* got 0\.0"),
    "box": (lambda: Box(1.0, 0.0), r"low must lie below high .* got 1\.0 and 0\.0"),
    "simplex": (lambda: Simplex(0), r"n must be a whole number of at least 1, got 0"),
    "frobenius": (lambda: FrobeniusBall(1.0, ()), r"shape must be a tuple .* got \(\)"),
    "product": (lambda: Product([]), r"parts must hold at least one set, got none"),
    "epsilon": (lambda: AdditiveError(BALL, -0.1), r"epsilon .* at least 0, got -0\.1"),
    "rho": (lambda: MultiplicativeError(BALL, 1.5), r"rho must lie in \(0, 1\], got 1\.5"),
    "adversary": (lambda: AdditiveError(BALL, 0.1, "idle"), r"adversary .* got 'idle'"),
    "inexact": (
        lambda: AdditiveError(TraceBall(1.0, (3, 3), method="lanczos"), 0.1),
        r"oracle must be exact, got TraceBall",
    ),
    "T": (lambda: frank_wolfe(cosine(), 0), r"T must be a whole number of at least 1, got 0"),
    "T float": (lambda: frank_wolfe(cosine(), 10.0), r"T must be a whole number .* got 10\.0"),
    "oracle shape": (
        lambda: frank_wolfe(cosine(), 5, oracle=BALL),
        r"oracle must answer for shape \(1,\), got \(3,\)",
    ),
    "no batches": (
        lambda: frank_wolfe(cosine(), 5, gradient=Minibatch(4)),
        r"gradient must be FullGradient\(\) for 'A: cosine', got Minibatch: .* NoisyProblem",
    ),
    "no batches spider": (lambda: frank_wolfe(cosine(), 5, gradient=SPIDER()), r"got SPIDER"),
    "batch": (lambda: Minibatch(0), r"batch .* got 0: give the number of samples"),
    "factor": (lambda: TheoremStep(0.0), r"factor .* got 0\.0"),
    "beta": (lambda: problem(beta=-1), r"beta .* got -1: give the Lipschitz constant"),
    "M": (lambda: problem(M=0), r"M .* got 0: give a bound on L"),
    "start shape": (
        lambda: problem(start=np.zeros(4)),
        r"start must have the set's shape \(3,\), got \(4,\)",
    ),
    "start outside": (
        lambda: problem(start=np.ones(3)),
        r"start must lie in K, got a gauge of 3: scale it down",
    ),
    "sigma": (lambda: NoisyProblem(problem(), -2.0), r"sigma .* got -2\.0"),
    "link": (lambda: Regression("relu"), r"link .* got 'relu'"),
    "n": (lambda: trace_quadratic(1), r"n must be a whole number of at least 2, got 1"),
    "chain": (lambda: zero_chain(2.5), r"n .* got 2\.5"),
    "entries": (lambda: observed_completion(4, 4, 9), r"entries must be at most half of 4 x 4, got 9"),
    "theorem step": (lambda: theorem.theorem_step(1.0, 1.0, 0.0, 10), r"D .* got 0\.0: give the diameter"),
    "pattern pair": (
        lambda: Pattern(np.array([0, 0]), np.array([1, 1]), (2, 2)),
        r"hold the same pair twice: average",
    ),
    "pattern range": (
        lambda: Pattern(np.array([2]), np.array([0]), (2, 2)),
        r"must index a matrix of shape \(2, 2\)",
    ),
    "pattern lengths": (lambda: Pattern(np.array([1, 0]), np.array([0]), (2, 2)), r"vectors of one length"),
    "observed vertex": (
        lambda: ObservedPoint(Pattern(np.array([0]), np.array([0]), (2, 2))).move(np.eye(2), 0.5),
        r"V must be a LowRank vertex, got ndarray",
    ),
    "observed gradient": (
        lambda: ObservedPoint(Pattern(np.array([0]), np.array([0]), (2, 2))).inner(np.eye(2)),
        r"G must be an ObservedMatrix on its own pattern, got ndarray",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_message(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_loss_that_overflows_is_reported_with_its_iteration():
    bad = DenseProblem(
        "wild", L1Ball(1.0, 2), lambda w: math.inf if w[0] < 0 else 0.0, lambda w: np.ones(2), beta=1.0, M=1.0
    )
    with pytest.raises(ValueError, match=r"loss and gap must stay finite, got inf .* at iteration 1 of 'wild'"):
        frank_wolfe(bad, 5)


def test_the_callers_start_never_moves():
    start = np.array([0.5, 0.0, 0.0])
    frank_wolfe(quadratic("q", BALL, np.array([0.0, 2.0, 0.0]), start=start), 10)
    assert np.array_equal(start, [0.5, 0.0, 0.0])
    W = DensePoint(start)
    W.move(np.ones(3), 0.5)
    assert np.array_equal(start, [0.5, 0.0, 0.0])
