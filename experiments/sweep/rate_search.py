"""Choose a learning rate on the development split, then run every seed with it: the cells of one arm of a sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Outcome = dict[str, Any]
C = TypeVar("C")


@dataclass(frozen=True)
class RateSearch(Generic[C]):
    """One arm: a grid of learning rates, the seeds they are judged on, the seeds of the comparison.

    The rates of ``start`` are tried first. While the best of those tried is at an edge and the grid goes on there, the
    next rate is tried too. With ``start=rates`` it is a plain grid search.

    Attributes:
        cell: learning rate, seed -> the cell.
        rates: the grid, rising; a method without a rate has the one rate 0.
        start: the rates to begin with.
        search_seeds: the seeds over which a rate's development loss is averaged.
        seeds: the seeds of the comparison.
        loss: of an outcome on the development split, lower is better; not finite for a run that diverged.
    """

    cell: Callable[[float, int], C]
    rates: tuple[float, ...]
    search_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    loss: Callable[[Outcome], float]
    start: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.rates or list(self.rates) != sorted(set(self.rates)):
            raise ValueError(f"rates={self.rates}: give one or more, rising")
        if not set(self.start) <= set(self.rates):
            raise ValueError(f"start={self.start} is not among rates={self.rates}")
        if not self.seeds or not self.search_seeds:
            raise ValueError(f"seeds={self.seeds}, search_seeds={self.search_seeds}: give one or more of each")

    def chosen(self, done: Mapping[C, Outcome]) -> float | None:
        """The learning rate with the lowest mean loss, the lower of two that tie; None while runs are missing."""
        return self._walk(done)[1]

    def at_edge(self, done: Mapping[C, Outcome]) -> bool:
        """Whether the chosen rate is the least or the largest of several, so that a better one may lie beyond."""
        return len(self.rates) > 1 and self.chosen(done) in (self.rates[0], self.rates[-1])

    def wanted(self, done: Mapping[C, Outcome]) -> list[C]:
        """The cells wanted, given the outcomes so far: those of the search, then those of the comparison."""
        tried, rate = self._walk(done)
        searched = [] if len(self.rates) == 1 else [self.cell(lr, seed) for seed in self.search_seeds for lr in tried]
        return searched if rate is None else [*searched, *(self.cell(rate, seed) for seed in self.seeds)]

    def results(self, done: Mapping[C, Outcome]) -> list[C]:
        """The runs of the comparison, one per seed.

        Raises:
            ValueError: the search is not over.
        """
        rate = self.chosen(done)
        if rate is None:
            raise ValueError("the learning rate is not chosen yet: runs of the search are missing")
        return [self.cell(rate, seed) for seed in self.seeds]

    def size(self) -> int:
        """The number of runs; an estimate where the search begins with some of the rates."""
        if len(self.rates) == 1:
            return len(self.seeds)
        tried = min(len(self.rates), len(self.start) + 2) if self.start else len(self.rates)
        return tried * len(self.search_seeds) + len(set(self.seeds) - set(self.search_seeds))

    def _walk(self, done: Mapping[C, Outcome]) -> tuple[Sequence[float], float | None]:
        """The rates to try, and the chosen one once all of them have been."""
        if len(self.rates) == 1:
            return self.rates, self.rates[0]
        low, high = 0, len(self.rates) - 1
        if self.start:
            low, high = (self.rates.index(pick(self.start)) for pick in (min, max))
        while True:
            tried = self.rates[low : high + 1]
            losses = {lr: self._mean(lr, done) for lr in tried}
            known = {lr: loss for lr, loss in losses.items() if loss is not None}
            if len(known) < len(tried):
                return tried, None
            best = min(tried, key=lambda lr: known[lr])
            if best == tried[0] and low > 0:
                low -= 1
            elif best == tried[-1] and high < len(self.rates) - 1:
                high += 1
            else:
                return tried, best

    def _mean(self, lr: float, done: Mapping[C, Outcome]) -> float | None:
        cells = [self.cell(lr, seed) for seed in self.search_seeds]
        if any(cell not in done for cell in cells):
            return None
        losses = [self.loss(done[cell]) for cell in cells]
        return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf


def gather(
    read: Callable[[C], Outcome | None], plans: Iterable[Callable[[Mapping[C, Outcome]], Sequence[C]]]
) -> dict[C, Outcome]:
    """The outcomes of some plans, from whichever process ran the cells.

    Args:
        read: the outcome of a cell; None if it has not been run (`Sweep.read`).
        plans: outcomes so far -> cells wanted; the plans do not depend on one another.
    """
    parts, done = list(plans), dict[C, Outcome]()
    while True:
        wanted = [cell for part in parts for cell in part(done)]
        new = {cell: out for cell in wanted if cell not in done and (out := read(cell)) is not None}
        if not new:
            return done
        done.update(new)
