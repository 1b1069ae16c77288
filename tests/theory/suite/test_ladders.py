"""The ladders at small sizes; each is also shown to fail where it should."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from theory.checks import FAIL, PASS, VACUOUS, rates
from theory.checks.check import expected_at_most
from theory.frank_wolfe import frank_wolfe
from theory.gradient_estimators import Minibatch
from theory.problems import NoisyProblem
from theory.problems.tight import trace_quadratic
from theory.suite import ladders

pytestmark = pytest.mark.numerics

HORIZONS = (60, 120, 240, 480)
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
# a feature of the processor that each of OpenBLAS's kernel families needs
KERNELS = {"Nehalem": "sse4_2", "Sandybridge": "avx", "Haswell": "avx2", "SkylakeX": "avx512f"}


@pytest.mark.parametrize("adversary", ["away", "stall"])
def test_epsilon_ladder(adversary):
    rungs = ladders.epsilon_ladder(lambda s: trace_quadratic(8, seed=s), 300, (0.0, 0.05, 0.2), 3, adversary)
    assert all(check.verdict != FAIL for rung in rungs for check in rung.checks)
    means = [rung.average.mean for rung in rungs]
    assert means == sorted(means)
    # at the largest error the bound without eps is false
    assert means[-1] > 1.5 * rungs[-1].runs[0].scale


@pytest.mark.parametrize("adversary", ["away", "stall"])
def test_rho_ladder_has_no_floor(adversary):
    rungs = ladders.rho_ladder(lambda s: trace_quadratic(8, seed=s), 300, (1.0, 0.5, 0.2), 3, adversary)
    assert all(check.verdict != FAIL for rung in rungs for check in rung.checks)
    assert rungs[-1].average.mean > 1.5 * rungs[-1].runs[0].scale
    long = ladders.rho_ladder(lambda s: trace_quadratic(8), 4800, (0.2,), 1, adversary)[0]
    assert long.average.mean < 0.4 * rungs[-1].average.mean  # 16 times the steps, a quarter of the gap


def test_batch_ladder_shows_the_bias_and_the_estimate_without_it():
    rungs = ladders.batch_ladder(NoisyProblem(trace_quadratic(10), 1.0), 200, (1, 16, 256), 4)
    assert all(check.verdict != FAIL for rung in rungs for check in rung.checks)
    bias = [rung.extra["reported"].mean / rung.average.mean for rung in rungs]
    assert bias == sorted(bias, reverse=True)
    assert bias[0] > 2
    assert bias[-1] > 1
    for rung in rungs:
        assert rung.extra["two batches"].low <= rung.average.high


def test_sufficient_batches_keep_the_rate_and_single_samples_do_not():
    problem = NoisyProblem(trace_quadratic(10), 1.0)
    assert rates.rate_check(ladders.growing_batch_runs(problem, HORIZONS)).verdict == PASS
    single = [frank_wolfe(problem, T, gradient=Minibatch(1), snapshots=0) for T in HORIZONS]
    assert rates.fitted_slope(HORIZONS, [r.average for r in single]) > -0.47


def test_the_interval_of_a_table_is_students():
    samples = [1.0, 1.1, 0.9, 1.05]
    half = ladders.interval(samples, 0.95).half
    # t quantile 3.1824 at three degrees of freedom
    assert half == pytest.approx(3.1824 * np.std(samples, ddof=1) / 2, rel=1e-4)
    assert math.isclose(ladders.interval([3.0]).half, 0.0)


def test_a_bound_above_every_gap_says_nothing():
    assert expected_at_most("x", 1.0, 2.0, 0.1, largest=1.5).verdict == VACUOUS
    assert expected_at_most("x", 1.0, 0.3, 0.1, largest=0.2).verdict == FAIL
    rung = ladders.rho_ladder(lambda s: trace_quadratic(8, seed=s), 300, (0.01,), 3)[0]
    assert rung.checks[-1].verdict == VACUOUS
    noisy = ladders.batch_ladder(NoisyProblem(trace_quadratic(), 2.0), 300, (1,), 3)[0]
    check = next(check for check in noisy.checks if check.name.startswith("E avg g <= 1.5 s + noise"))
    assert check.verdict == VACUOUS


VERDICTS = """
import json
from theory.suite import tasks
rows = [*tasks.batch_task((1, 4096), 2, T=500), *tasks.estimators_task(0)]
print(json.dumps([[row.label, row.average, [[c.name, c.verdict] for c in row.checks]] for row in rows]))
"""


@pytest.mark.long
def test_verdicts_do_not_depend_on_the_kernels():
    """At b = 4096 a run is chaotic: after some hundred steps kernels differ in the digits, and not in a verdict."""
    shown = []
    for family in ("Nehalem", "Sandybridge", "Haswell", "SkylakeX"):
        # OpenBLAS does as it is told on processors that cannot, so newer kernels only where they run
        if KERNELS[family] in CPU:
            environment = {**os.environ, "OPENBLAS_CORETYPE": family, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-c", VERDICTS]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            shown.append(json.loads(done.stdout))
    if len(shown) < 2:
        pytest.skip("needs two families of OpenBLAS's kernels")
    for rows in shown[1:]:
        for (label, average, verdicts), (_, other, others) in zip(shown[0], rows, strict=True):
            assert verdicts == others, label
            assert other == pytest.approx(average, rel=0.05)
