"""The live link of a checkpoint on disk. No chain holds it: the command line shows it, and ties it if asked."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from cola.chain.chain import Chain
from cola.chain.on_disk import CHECKPOINT
from cola.checkpoint.directory import read_run
from cola.checkpoint.state import RunState
from cola.lora.link import Factor, KnotReport, LayerReport, Link, Rows


@dataclass(frozen=True)
class UntiedLink:
    """A trained link that was not tied when the checkpoint was written.

    Attributes:
        link: as `ChainOptimizer.finish` would have recorded it; what a tie would lose is not known (NaN).
        steps: optimizer steps since its knot.
        obstacle: why it cannot be tied without its optimizer, as the end of a sentence; None if it can.
    """

    link: Link
    steps: int
    obstacle: str | None

    def __str__(self) -> str:
        since = "its knot" if self.link.index else "the run began"
        return f"live link {self.link.index}, {self.steps} step{'' if self.steps == 1 else 's'} since {since}"


def read_untied_link(directory: Path, chain: Chain) -> UntiedLink | None:
    """The live link in a directory's checkpoint; None if there is none that has been trained.

    Args:
        directory: that `ChainOptimizer.save` wrote.
        chain: from the same directory. If `Chain.save` has brought it a later link there, no link is live.

    Raises:
        StoreError: the checkpoint is damaged; names the file.
    """
    if not (directory / CHECKPOINT[0]).is_file():
        return None
    state = read_run(directory)
    counters, tied = (
        state.counters,
        0 if state.chain is None else max((link.step for link in state.chain.links), default=0),
    )
    steps = counters.steps - tied if counters.steps >= tied else counters.steps  # a chain that was followed
    if counters.index != chain.missing + len(chain) or not steps:
        return None
    link = _link(state)
    if not _changes(link, state):
        return None
    moved = any(group.get("train_mode") for group in state.optimizer["param_groups"])
    why = "has a base optimizer with modes, which ties other values than it trains: use opt.load and opt.finish"
    return UntiedLink(link, steps, why if moved else None)


def _link(state: RunState) -> Link:
    factors = {}
    for path, (scaling, rounding, form) in state.layers.items():
        start = (state.start_A[path], state.start_B[path]) if path in state.start_A else None
        factors[path] = Factor(state.A[path], state.B[path], scaling, rounding, start, form)
    shared = {path: state.trained[first] for path, first in state.shared.items()}
    layers = {path: LayerReport(factor.norm(), math.nan, factor.rounding) for path, factor in factors.items()}
    counters = state.counters
    report = KnotReport(
        index=counters.index,
        step=counters.steps,
        rank=max((factor.rank for factor in factors.values()), default=0),
        delta_norm=math.hypot(*(layer.delta_norm for layer in layers.values())),
        lost_norm=math.nan,
        loss=state.loss,
        seconds=0.0,
        layers=layers,
    )
    rows = {n: Rows(torch.tensor(indices), state.trained[path]) for n, (path, indices) in state.rows.items()}
    plain = {path: value for path, value in state.trained.items() if path not in {p for p, _ in state.rows.values()}}
    trained = {**plain, **shared, **state.buffers}
    return Link(counters.index, counters.arguments["seed"], factors, trained, report, rows)


def _changes(link: Link, state: RunState) -> bool:
    """Whether `ChainOptimizer.finish` would tie the link: it has been trained, or something else has."""
    links = () if state.chain is None else state.chain.links
    last = {name: value for earlier in links for name, value in earlier.trained.items()}
    buffers = any(name not in last or not torch.equal(last[name], value) for name, value in state.buffers.items())
    factors = any(factor.start is not None or (factor.A.any() and factor.B.any()) for factor in link.factors.values())
    return factors or bool(state.trained) or buffers
