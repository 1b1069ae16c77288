"""The demo's comparison: choose a learning rate per arm on validation, train it on every seed, then test once.

The runs are cells of a sweep, spread over processes; the test split is read after every choice has been made, and only
for chosen runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from experiments.methods import Method
from experiments.study.arms import Arm
from experiments.study.demo_cells import DemoCell, Setting
from experiments.sweep.rate_search import RateSearch
from experiments.sweep.sweep import Outcome


@dataclass(frozen=True)
class Plan:
    """What to compare.

    Attributes:
        arms: name -> arm, in the order of the table.
        rates: arm -> learning rates to choose from.
        search_seeds: the seeds over which a rate's validation loss is averaged; the first of `seeds`.
        seeds: the seeds of the comparison, the same for every arm.
        setting: what all runs share.
    """

    arms: Mapping[str, Arm]
    rates: Mapping[str, tuple[float, ...]]
    search_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    setting: Setting

    def __post_init__(self) -> None:
        if self.search_seeds != self.seeds[: len(self.search_seeds)] or not self.search_seeds:
            raise ValueError(f"search_seeds={self.search_seeds} must be the first of seeds={self.seeds}")

    @cached_property
    def searches(self) -> dict[str, RateSearch[DemoCell]]:
        """Arm -> its runs."""
        return {
            name: RateSearch(
                cell=lambda lr, seed, arm=arm: DemoCell(self.setting, arm.method, lr, seed),  # type: ignore[misc]
                rates=self.rates[name],
                start=self.rates[name],
                search_seeds=self.search_seeds,
                seeds=self.seeds,
                loss=lambda outcome: float(outcome["validation"]),
            )
            for name, arm in self.arms.items()
        }

    @property
    def untouched(self) -> DemoCell:
        """The cell that tests the model before fine-tuning."""
        return DemoCell(self.setting, Method("zero-shot"), 0.0, self.seeds[0]).tested

    def wanted(self, done: Mapping[DemoCell, Outcome]) -> list[DemoCell]:
        """The cells wanted, given what is done: all training runs, and when these are done, the tests."""
        # the longest runs first, so that no process is left alone with one at the end
        arms = sorted(self.arms, key=lambda name: self.arms[name].method.adapts)
        runs = [cell for name in arms for cell in self.searches[name].wanted(done)]
        if any(run not in done for run in runs):
            return runs
        tests = [run.tested for search in self.searches.values() for run in search.results(done)]
        return [*runs, *tests, self.untouched]

    def size(self) -> int:
        """The number of training runs."""
        searched = [len(rates) * len(self.search_seeds) for rates in self.rates.values() if len(rates) > 1]
        return len(self.rates) * len(self.seeds) + sum(searched) - len(searched) * len(self.search_seeds)


@dataclass(frozen=True)
class Results:
    """What came out of a plan. Losses are in bits per byte."""

    plan: Plan
    done: Mapping[DemoCell, Outcome]

    @property
    def untouched(self) -> float:
        """The loss of the model before fine-tuning, on the test split."""
        return float(self.done[self.plan.untouched]["test"])

    def chosen(self, arm: str) -> list[DemoCell]:
        """The runs of an arm at its chosen rate, in the order of the seeds."""
        return self.plan.searches[arm].results(self.done)

    def final(self, arm: str) -> list[Outcome]:
        """What came out of them."""
        return [self.done[run] for run in self.chosen(arm)]

    def losses(self, arm: str) -> list[float]:
        """Their test losses."""
        return [self.done[run.tested]["test"] for run in self.chosen(arm)]

    def runs(self) -> list[tuple[str, DemoCell, Outcome]]:
        """Every training run, chosen or not: arm, cell, what came out, and of a chosen run its test."""
        return [
            (arm, run, {**self.done[run], **self.done.get(run.tested, {"test": None, "rebuilt": None})})
            for arm, search in sorted(self.plan.searches.items())
            for run in sorted(set(search.wanted(self.done)), key=lambda run: (run.lr, run.seed))
        ]
