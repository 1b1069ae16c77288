"""Links of several kinds from the same weights, at equal budgets: how well they are aligned, and what they gain.

Theorem 4.1 takes a link for a vertex of K that is nearly the best one. Here the best vertices themselves are tied, with
trained links next to them. Every kind of link reads the same batches, one gradient each, and has one number that is
tuned: a learning rate, or the size of the vertex. Then the same fixed loss measures every link, as `GapProbe` does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cola import KnotError
from theory.real_run.kinds import Kind, Task
from theory.real_run.probe import GapProbe
from theory.real_run.snapshots import Snapshots
from theory.suite.ladders import interval

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Measured:
    """A run of links of one kind: arrays have one entry per link, in nats.

    Attributes:
        kind: its name. seed: of its data and draws. size: the tuned number.
        loss: (T+1,) the fixed loss before each link, and after the last.
        best: the first-order gain of the best vertex of the trace ball around ``W_t`` with the link's trace norms.
        spectral_best: the same for the spectral ball with the link's largest singular values, NaN where the sketch does
            not find all of G.
        promised: the link's own, ``-<G, B A>``.
        terms: of the run's average gap, as in `Decomposition`. off: error of their sum, in units of rounding.
    """

    kind: str
    seed: int
    size: float
    loss: np.ndarray
    best: np.ndarray
    spectral_best: np.ndarray
    promised: np.ndarray
    terms: dict[str, float]
    off: float

    @property
    def drop(self) -> np.ndarray:
        """``L_t - L_{t+1}``."""
        return self.loss[:-1] - self.loss[1:]

    @property
    def curvature(self) -> np.ndarray:
        """What curvature took from the promise, ``eta^2 c_t / 2``."""
        return self.promised - self.drop

    @property
    def error(self) -> np.ndarray:
        """What the link promises less than the best vertex, ``eta eps_t``."""
        return self.best - self.promised

    @property
    def alignment(self) -> np.ndarray:
        """``rho_t``, the promised share of the best vertex's gain: 1 for that vertex."""
        return _share(self.promised, self.best)

    @property
    def spectral_alignment(self) -> np.ndarray:
        """The same share on the spectral ball: 1 for the polar factor."""
        return _share(self.promised, self.spectral_best)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        arrays = ("loss", "best", "promised", "error", "curvature", "drop", "alignment", "spectral_alignment")
        lists = {name: [x if math.isfinite(x) else None for x in getattr(self, name).tolist()] for name in arrays}
        return {**{name: getattr(self, name) for name in ("kind", "seed", "size", "terms")}, **lists}


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The quotient; NaN for a link that is zero."""
    return np.divide(part, whole, out=np.full_like(part, math.nan), where=whole > 0)


@dataclass(frozen=True)
class Budget:
    """What every kind may spend: links, and batches per link. The largest of `Task.ranks` makes the sketch exact."""

    links: int
    steps: int
    sketch: int = 64


def run_links(task: Task, kind: Kind, size: float, budget: Budget, seed: int, probed: bool = True) -> Measured | None:
    """Tie links of one kind one after the other, from the start, and measure each.

    Args:
        task, kind, size, budget: of the run. seed: of its batches and draws. probed: whether to measure.
    """
    model = task.restored()
    stream, record = task.batches(seed), Snapshots(model, task.layers)
    options: dict[str, Any] = {"sketch": budget.sketch, "ball": "spectral", "seed": seed}
    probe = GapProbe(model, record, task.fixed, task.loss, **options) if probed else None
    for index in range(budget.links):
        kind.link(task, [next(stream) for _ in range(budget.steps)], size, 1000 * seed + index)
        record.mark((index + 1) * budget.steps)
    if probe is None:
        return None
    result = probe.decompose(ball="rank", rank=1)
    best, spectral, promised = np.zeros((3, budget.links))
    for t, link in enumerate(record.chain):
        for path, layer in probe.probes[t].layers.items():
            sigma = torch.linalg.svdvals(link.factors[path].delta())
            best[t] += float(sigma.sum()) * layer.sigma[0]
            spectral[t] += float(sigma[0]) * sum(layer.sigma) if layer.residual == 0 else math.nan
            promised[t] -= layer.moved
    rounding = np.finfo(float).eps * max(1.0, float(np.abs(result.loss).max()) / (result.eta * budget.links))
    off = result.identity_error() / rounding
    return Measured(kind.name, seed, size, result.loss, best, spectral, promised, result.terms, off)


def tuned(task: Task, kind: Kind, budget: Budget, seed: int, tries: int = 12) -> float:
    """The size of a kind: from its start by factors of two to an inner optimum of the loss on the tuning batches.

    Args:
        task, kind, budget: of the runs. seed: of the tuning runs, none of the measured ones.
        tries: most moves to a better size.
    """
    found: dict[int, float] = {}

    def loss_at(power: int) -> float:
        if power not in found:
            try:
                run_links(task, kind, kind.start * 2.0**power, budget, seed, probed=False)
                value = task.mean_loss(task.tuning)
            except KnotError:  # a link that is not finite cannot be tied
                value = math.inf
            found[power] = value if math.isfinite(value) else math.inf
        return found[power]

    at = 0
    for _ in range(tries):
        best = min((at, at - 1, at + 1), key=loss_at)
        if best == at:
            break
        at = best
    else:
        warnings.warn(f"{kind.name}: no inner optimum within {tries} moves, its size is an edge", stacklevel=2)
    return kind.start * 2.0**at


#: the columns of the two blocks of `table`: heading -> value of a run, in nats where it is a loss
LOSSES: dict[str, Callable[[Measured], float]] = {
    "loss after": lambda run: float(run.loss[-1]),
    "alignment": lambda run: float(run.alignment.mean()),
    "on the spectral ball": lambda run: float(run.spectral_alignment.mean()),
}
ACCOUNT: dict[str, Callable[[Measured], float]] = {
    "best vertex": lambda run: float(run.best.mean()),
    "error": lambda run: float(run.error.mean()),
    "promise": lambda run: float(run.promised.mean()),
    "curvature": lambda run: float(run.curvature.mean()),
    "drop": lambda run: float(run.drop.mean()),
}


def table(runs: Sequence[Measured], untouched: float) -> str:
    """Two blocks of one row per kind: the losses and alignments, and the account of a link. Intervals are over seeds.

    Args:
        runs: every kind with the same seeds. untouched: the fixed loss before the first link.
    """
    by_kind: dict[str, list[Measured]] = {}
    for run in runs:
        by_kind.setdefault(run.kind, []).append(run)
    first = next(iter(by_kind))
    reference = [run.loss[-1] for run in by_kind[first]]
    width = max(len(name) for name in by_kind)
    blocks = []
    for head, columns in (("link", LOSSES), ("nats per link", ACCOUNT)):
        titles = [f"{title:>20}" for title in columns]
        if head == "link":
            titles = [f"{'size':>8}", titles[0], f"{'below ' + first:>20}", *titles[1:]]
        lines = [f"{head:{width}} " + " ".join(titles)]
        lines.append("-" * len(lines[0]))
        for name, group in by_kind.items():
            cells = [f"{_interval([value(run) for run in group]):>20}" for value in columns.values()]
            if head == "link":
                gains = [other - run.loss[-1] for other, run in zip(reference, group)]
                cells = [f"{group[0].size:>8.3g}", cells[0], f"{_interval(gains):>20}", *cells[1:]]
            lines.append(f"{name:{width}} " + " ".join(cells))
        blocks.append("\n".join(lines))
    note = (
        f"loss before: {untouched:.3f}; {CONFIDENCE:.0%} intervals over {len(reference)} seeds; alignments and nats are"
        " means over links\nbest vertex - error = promise, promise - curvature = drop"
    )
    return "\n\n".join([*blocks, note])


def _interval(samples: Sequence[float]) -> str:
    if not all(map(math.isfinite, samples)):
        return "–"
    found = interval(samples, CONFIDENCE)
    return f"{found.mean:.3f}" + (f" ± {found.half:.3f}" if len(samples) > 1 else "")
