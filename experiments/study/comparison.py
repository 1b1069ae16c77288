"""A comparison of arms: choose a learning rate per arm on the development split, train every seed, then test once.

The runs are cells of a sweep, spread over processes. The test split is read after every choice has been made, and only
for chosen runs. Arms see the same seeds, so they are compared in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from experiments.methods import Method
from experiments.report import stats
from experiments.report.stats import Interval, Paired
from experiments.study import arms
from experiments.study.arms import CEILING, REFERENCE, Arm
from experiments.study.cells import StudyCell
from experiments.study.planted import Planted
from experiments.study.setting import Setting
from experiments.sweep import Outcome, RateSearch


@dataclass(frozen=True)
class Plan:
    """The arms to compare, with their rates, seeds and setting.

    Attributes:
        arms: name -> arm, in the order of the table.
        rates: arm -> learning rates to choose from.
        search_seeds: the seeds over which a rate's development loss is averaged; the first of `seeds`.
        seeds: the seeds of the comparison, the same for every arm.
        setting: shared by all runs.
        walk: begin at an arm's start and go on while the best rate is at an edge of those tried; False: try all rates.
        test_untouched: also test the model before fine-tuning.
    """

    arms: Mapping[str, Arm]
    rates: Mapping[str, tuple[float, ...]]
    search_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    setting: Setting | Planted
    walk: bool = False
    test_untouched: bool = False

    def __post_init__(self) -> None:
        if self.search_seeds != self.seeds[: len(self.search_seeds)] or not self.search_seeds:
            raise ValueError(f"search_seeds={self.search_seeds} must be the first of seeds={self.seeds}")

    @cached_property
    def searches(self) -> dict[str, RateSearch[StudyCell]]:
        """Arm -> its training runs."""
        return {
            name: RateSearch(
                cell=lambda lr, seed, arm=arm: StudyCell(self.setting, arm.method, lr, seed),  # type: ignore[misc]
                rates=self.rates[name],
                start=(arm.start,) if self.walk else self.rates[name],
                search_seeds=self.search_seeds,
                seeds=self.seeds,
                loss=lambda outcome: outcome.get("dev", math.inf),
            )
            for name, arm in self.arms.items()
        }

    @property
    def untouched(self) -> StudyCell:
        """The cell that tests the model before fine-tuning."""
        return StudyCell(self.setting, Method("zero-shot"), 0.0, self.seeds[0]).tested

    def wanted(self, done: Mapping[StudyCell, Outcome]) -> list[StudyCell]:
        """The cells wanted, given the outcomes so far: all training runs, and when these are done, the tests."""
        # the longest runs first, so that no process is left alone with one at the end
        order = sorted(self.arms, key=lambda name: self.arms[name].method.adapts)
        runs = [cell for name in order for cell in self.searches[name].wanted(done)]
        if any(run not in done for run in runs):
            return runs
        tests = [run.tested for search in self.searches.values() for run in search.results(done)]
        return [*runs, *tests, *([self.untouched] if self.test_untouched else [])]

    def size(self) -> int:
        """The number of training runs; with `walk` an estimate."""
        return sum(search.size() for search in self.searches.values())

    def cells(self) -> int:
        """The number of cells: training runs and tests."""
        return self.size() + len(self.arms) * len(self.seeds) + self.test_untouched

    def part(self, names: Iterable[str]) -> Plan:
        """The plan of some arms."""
        return replace(self, arms={name: self.arms[name] for name in names})

    def require_possible(self, options: str = "--arms") -> None:
        """Refuse arms that the model cannot carry, before anything is run.

        Args:
            options: of the command, by which its user chooses arms.

        Raises:
            ValueError: as `arms.require_possible`.
        """
        arms.require_possible(
            self.arms,
            self.setting.load(),
            lambda arm, model: StudyCell(self.setting, arm.method, arm.start, 0).optimizer(model),
            options,
        )


@dataclass(frozen=True)
class Results:
    """The outcomes of a plan; losses are in nats per token times `scale`."""

    plan: Plan
    done: Mapping[StudyCell, Outcome]
    scale: float = 1.0

    @property
    def untouched(self) -> float:
        """The loss of the model before fine-tuning, on the test split."""
        return float(self.done[self.plan.untouched]["test"]) * self.scale

    def complete(self, arm: str) -> bool:
        """Whether every chosen run of an arm has its test; a run that diverged has none."""
        search = self.plan.searches[arm]
        return search.chosen(self.done) is not None and all(
            "test" in self.done.get(run.tested, {}) for run in search.results(self.done)
        )

    def chosen(self, arm: str) -> list[StudyCell]:
        """The runs of an arm at its chosen rate, in the order of the seeds."""
        return self.plan.searches[arm].results(self.done)

    def final(self, arm: str) -> list[Outcome]:
        """The outcomes of these runs."""
        return [self.done[run] for run in self.chosen(arm)]

    def losses(self, arm: str) -> list[float]:
        """The test losses of these runs."""
        return [self.done[run.tested]["test"] * self.scale for run in self.chosen(arm)]

    def runs(self) -> list[tuple[str, StudyCell, Outcome]]:
        """Every training run, chosen or not: arm, cell, outcome, and for a chosen run the outcome of its test."""
        return [
            (arm, run, {**self.done[run], **self.done.get(run.tested, {})})
            for arm, search in sorted(self.plan.searches.items())
            for run in sorted(set(search.wanted(self.done)), key=lambda run: (run.lr, run.seed))
        ]


@dataclass(frozen=True)
class Row:
    """One arm's line of a table; losses are in the unit of its `Results`.

    Attributes:
        arm: its name.
        label: as shown.
        reference: the arm it is compared with; None for a reference itself, or where that arm is missing.
        reference_label: its label.
        lr: the chosen peak learning rate.
        at_edge: whether it is an edge of those to choose from, so that a better one may lie beyond.
        tests: test loss per seed.
        dev_by_epoch: development loss after every epoch, mean over seeds.
        train_loss: mean over the last epoch and the seeds.
        against: the paired difference from the reference; None without one. Holm's correction is over all rows.
        gap: the share closed of the gap from the reference to full fine-tuning; NaN where there is none.
        knots: number inside the run, mean over seeds.
        parameters: trainable at once, at most.
        state_bytes: of trained state.
        seconds: of one core for one run, training only, mean over seeds.
    """

    arm: str
    label: str
    reference: str | None
    reference_label: str
    lr: float
    at_edge: bool
    tests: tuple[float, ...]
    dev_by_epoch: tuple[float, ...]
    train_loss: float
    against: Paired | None
    gap: float
    knots: float
    parameters: int
    state_bytes: int
    seconds: float

    @property
    def test(self) -> Interval:
        """The mean test loss with its 95 % t interval over seeds."""
        return stats.t_interval(self.tests)


def rows(results: Results) -> list[Row]:
    """One row per complete arm, in the plan's order."""
    plan = results.plan
    losses = {arm: results.losses(arm) for arm in plan.arms if results.complete(arm)}
    references = {arm: plan.arms[arm].reference for arm in losses}
    references = {arm: other for arm, other in references.items() if other != arm and other in losses}
    against = stats.paired(losses, references)
    means = {arm: _mean(values) for arm, values in losses.items()}
    table = []
    for arm, tests in losses.items():
        base = references.get(arm, arm if arm == REFERENCE else None)
        final = results.final(arm)
        last = [_last_epoch(outcome["losses"], plan.setting.epochs) for outcome in final]
        table.append(
            Row(
                arm=arm,
                label=plan.arms[arm].label,
                reference=references.get(arm),
                reference_label=plan.arms[references[arm]].label if arm in references else "",
                lr=results.chosen(arm)[0].lr,
                at_edge=plan.searches[arm].at_edge(results.done),
                tests=tuple(tests),
                dev_by_epoch=tuple(
                    _mean(column) * results.scale for column in zip(*(outcome["dev_by_epoch"] for outcome in final))
                ),
                train_loss=_mean([_mean(part) for part in last]) * results.scale,
                against=against.get(arm),
                gap=stats.gap_closed(means[arm], means[base], means[CEILING])
                if base and CEILING in means
                else math.nan,
                knots=_mean([len(inside(outcome)) for outcome in final]),
                parameters=final[0]["parameters"],
                state_bytes=final[0]["state_bytes"],
                seconds=_mean([outcome["cpu_seconds"] for outcome in final]),
            )
        )
    return table


def inside(outcome: Outcome) -> list[dict[str, Any]]:
    """The knots of a run without the tie that ends it."""
    return [knot for knot in outcome["knots"] if knot["step"] < len(outcome["losses"])]


def _last_epoch(losses: Sequence[float], epochs: int) -> Sequence[float]:
    return losses[-max(1, len(losses) // epochs) :]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
