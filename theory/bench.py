"""Comparison of speed with copt on the same problems: ``python -m theory.bench``, with the extra ``bench``.

Both programs run Algorithm 2 with the theorem's step for the same T on ``problem(m, n, seed)``. Rounds alternate
between them, so a busy machine slows both, and each ratio comes from one round. Times are per iteration of a
whole run. The average gaps must agree. At the end one Lanczos run with a residual of 1e-8 certifies both final
points.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from theory import theorem
from theory.command_line import Help, make_folder, progress
from theory.frank_wolfe import frank_wolfe
from theory.iterates import ObservedMatrix
from theory.oracles.lanczos import top_singular
from theory.problems.recovery import DenseCompletion, ObservedCompletion, low_rank_data, observed_completion, robust

# dense m, n, T and observed m, n, entries, T: the sizes of the comparison
DENSE = ((200, 200, 500), (1000, 1000, 100), (3000, 2000, 12))
OBSERVED = ((3000, 2000, 292_686, 15),)
Loss = Callable[[np.ndarray], tuple[float, np.ndarray]]


@dataclass
class Row:
    """One comparison: medians over rounds, in milliseconds per iteration, and the gaps of both programs.

    Attributes:
        ratio: copt's time over ours, the median over rounds. low, high: the extremes over rounds.
        average, copt_average: average gap of the run, on which both must agree.
        gap, copt_gap: certified gap of the final points. They are not compared: the gap of a single iterate
            varies by percents with the tolerance of the oracle.
    """

    name: str
    T: int
    rounds: int
    ours_ms: float
    copt_ms: float
    ratio: float
    low: float
    high: float
    average: float
    copt_average: float
    gap: float
    copt_gap: float


def problem(m: int, n: int, seed: int = 0) -> DenseCompletion:
    """The comparison's problem: rank 5 plus noise and outliers, ``delta = |X|_*``, ``W_1 = 0``, ``M = L(W_1)``."""
    data = low_rank_data(m, n, seed)
    return DenseCompletion(data.Y, data.delta)


def certified_gap(G: np.ndarray | ObservedMatrix, pairing: float, delta: float) -> float:
    """``delta sigma_1(G) + <G, W>``, with the singular value converged to a relative residual of 1e-8."""
    pairs = top_singular(G, rng=np.random.default_rng(99), tol=1e-8, max_steps=400)
    return delta * float(pairs.sigma[0]) + pairing


def _copt() -> tuple[Any, Any]:
    try:
        from copt import minimize_frank_wolfe
        from copt.constraint import TraceBall
    except ImportError as error:
        raise SystemExit(
            'copt is not installed: pip install "chain-of-lora[bench]" adds it for this comparison'
        ) from error
    return minimize_frank_wolfe, TraceBall


def run_copt(loss: Loss, shape: tuple[int, int], delta: float, eta: float, T: int) -> tuple[np.ndarray, float]:
    """copt's Frank-Wolfe on the trace ball with a constant step; returns the final matrix and the average gap."""
    minimize, ball = _copt()
    gaps: list[float] = []

    def step(state: dict[str, Any]) -> float:
        gaps.append(float(state["certificate"]))
        return eta

    def flat(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, G = loss(x.reshape(shape))
        return value, G.ravel()

    result = minimize(
        flat,
        np.zeros(shape[0] * shape[1]),
        ball(delta, shape).lmo,
        jac=True,
        step=step,
        lipschitz=1.0,  # a constant step ignores it, but without it copt prints an estimate
        max_iter=T,
        tol=0,
    )
    return result.x.reshape(shape), float(np.mean(gaps))


def plain_loss(Y: np.ndarray) -> Loss:
    """The robust loss in plain NumPy, as a user of copt would write it."""

    def loss(W: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = robust(W - Y)
        return float(value.mean()), slope / slope.size

    return loss


def blocked_loss(p: DenseCompletion) -> Loss:
    """Our cache-blocked loss for copt, so that only the algorithms differ."""

    def loss(W: np.ndarray) -> tuple[float, np.ndarray]:
        G = np.empty_like(W)
        return p.loss_into(W, G), G

    return loss


def observed_loss(p: ObservedCompletion) -> Loss:
    """The loss over observed entries, with the dense gradient that copt's oracle needs."""
    rows, cols, y = p.pattern.rows, p.pattern.cols, p.y

    def loss(W: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = robust(W[rows, cols] - y)
        G = np.zeros_like(W)
        G[rows, cols] = slope / y.size
        return float(value.mean()), G

    return loss


def compare(
    name: str,
    p: DenseCompletion | ObservedCompletion,
    loss: Loss,
    T: int,
    rounds: int,
) -> Row:
    """Run both programs in turn for some rounds, then certify both final points."""
    delta, shape = float(p.oracle.circumradius), (p.oracle.shape[0], p.oracle.shape[1])
    eta = theorem.theorem_step(p.M, p.beta, p.oracle.diameter, T)
    ours, theirs = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        run = frank_wolfe(p, T, snapshots=0)
        middle = time.perf_counter()
        W, average = run_copt(loss, shape, delta, eta, T)
        ours.append((middle - started) / T * 1e3)
        theirs.append((time.perf_counter() - middle) / T * 1e3)
    ratios = np.array(theirs) / np.array(ours)
    G, copt_G = p.gradient(run.final), loss(W)[1]
    return Row(
        name,
        T,
        rounds,
        float(np.median(ours)),
        float(np.median(theirs)),
        float(np.median(ratios)),
        float(ratios.min()),
        float(ratios.max()),
        run.average,
        average,
        certified_gap(G, run.final.inner(G), delta),
        certified_gap(copt_G, float(np.sum(copt_G * W)), delta),
    )


def made(m: int, n: int, kind: str | int, seed: int) -> tuple[str, DenseCompletion | ObservedCompletion, Loss]:
    """The name, the problem and copt's loss of one comparison.

    Args:
        m: rows.
        n: columns.
        kind: ``"plain"`` or ``"blocked"``, the loss that copt gets on the dense problem, or the number of observed
            entries.
        seed: of the data.
    """
    if isinstance(kind, int):
        q = observed_completion(m, n, kind, seed, certify_steps=0)  # copt certifies nothing either
        return f"observed {m}x{n}, {kind} entries", q, observed_loss(q)
    p = problem(m, n, seed)
    if kind == "plain":
        return f"dense {m}x{n}, plain loss", p, plain_loss(p.Y)
    return f"dense {m}x{n}, our loss in both", p, blocked_loss(p)


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    # a column with two numbers has ours / copt's
    head = (
        f"{'problem':34} {'T':>4} {'ours ms':>8} {'copt ms':>8} {'ratio':>6} {'spread':>13}"
        f" {'average gap':>19} {'last gap':>19}"
    )
    lines = [head, "-" * len(head)]
    for r in rows:
        lines.append(
            f"{r.name:34} {r.T:>4} {r.ours_ms:>8.2f} {r.copt_ms:>8.2f} {r.ratio:>6.1f}"
            f" {r.low:>5.1f}..{r.high:<6.1f} {r.average:>9.5f}/{r.copt_average:>9.5f}"
            f" {r.gap:>9.5f}/{r.copt_gap:>9.5f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; returns 1 if the two runs have different average gaps."""
    parser = argparse.ArgumentParser(
        prog="python -m theory.bench",
        description="Compare with copt on the same problems in one run.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved rounds")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the data")
    parser.add_argument("--quick", action="store_true", help="the smallest dense problem only")
    parser.add_argument("--out", type=Path, default=Path("runs/fw_bench"), metavar="DIR", help="folder of the results")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}: give the number of interleaved rounds")
    try:
        make_folder(options.out)
    except ValueError as error:
        parser.error(str(error))
    _copt()  # or refuse before anything runs
    cases: list[tuple[int, int, int, str | int]] = [
        (*size, kind) for size in (DENSE[:1] if options.quick else DENSE) for kind in ("plain", "blocked")
    ]
    cases += [] if options.quick else [(m, n, T, entries) for m, n, entries, T in OBSERVED]
    rows = [
        compare(*made(m, n, kind, options.seed), T, options.rounds)
        for m, n, T, kind in progress(cases, "comparison", lambda case: f"{case[0]}x{case[1]}")
    ]
    print(table(rows))
    with (options.out / "results.jsonl").open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
    print(f"results: {options.out / 'results.jsonl'}")
    # the oracles stop at a residual, so trajectories differ, but far less than by one percent
    apart = [row for row in rows if abs(row.average - row.copt_average) > 0.01 * row.copt_average]
    for row in apart:
        print(f"FAIL {row.name}: average gaps {row.average:.6g} and {row.copt_average:.6g} differ by over 1 %")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
