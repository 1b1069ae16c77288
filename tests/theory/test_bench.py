"""The comparison with copt: both programs solve the same problem with the same gaps. Times are not tested."""

import numpy as np
import pytest

from theory import bench
from theory.frank_wolfe import frank_wolfe
from theory.problems.recovery import observed_completion
from theory.theorem import theorem_step

pytest.importorskip("copt", reason="copt is an extra that only the comparison needs")


def test_same_average_gap_on_the_dense_problem():
    p = bench.problem(70, 66)
    row = bench.compare("dense", p, bench.plain_loss(p.Y), T=40, rounds=1)
    assert row.average == pytest.approx(row.copt_average, rel=0.01)
    assert "dense" in bench.table([row])


def test_same_iterates_with_an_exact_oracle():
    """Up to 64 columns our oracle is a full SVD, to which copt's converges, so the final points agree."""
    p = bench.problem(60, 50)
    run = frank_wolfe(p, 30, snapshots=0)
    eta = theorem_step(p.M, p.beta, p.oracle.diameter, 30)
    W, average = bench.run_copt(bench.blocked_loss(p), (60, 50), p.oracle.delta, eta, 30)
    assert run.final.dense() == pytest.approx(W, abs=1e-6 * np.abs(W).max())
    assert run.average == pytest.approx(average, rel=1e-6)


def test_same_average_gap_on_observed_entries():
    q = observed_completion(80, 70, 1500)
    row = bench.compare("observed", q, bench.observed_loss(q), T=20, rounds=1)
    assert row.average == pytest.approx(row.copt_average, rel=0.01)
