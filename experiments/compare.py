"""A comparison of arms: choose a learning rate on validation, train it on every seed, then test once.

Runs are independent and small, so they are spread over processes of one thread each. A run leaves its merged
weights and its chain in a folder; the test split is read from there, after every choice has been made, and
only for chosen runs.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from cola import Chain
from experiments import corpus, tiny_opt
from experiments.arms import ARMS
from experiments.evaluation import bits_per_byte
from experiments.train import Outcome, Setting, fine_tune


@dataclass(frozen=True, order=True)
class Run:
    """Which run: an arm's name, its peak learning rate, the seed."""

    arm: str
    lr: float
    seed: int

    def folder(self, root: Path) -> Path:
        """Where the run leaves its weights and its chain."""
        return root / f"{self.arm}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """What to compare.

    Attributes:
        rates: arm -> learning rates to choose from.
        search_seeds: the seeds over which a rate's validation loss is averaged; the first of `seeds`.
        seeds: the seeds of the comparison, the same for every arm.
        setting: what all runs share.
        model: folder of the untouched model.
        scratch: folder for the weights and chains of runs.
        workers: processes; 1 runs everything in this one.
    """

    rates: Mapping[str, tuple[float, ...]]
    search_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    setting: Setting
    model: Path
    scratch: Path
    workers: int = 1

    def __post_init__(self) -> None:
        if self.search_seeds != self.seeds[: len(self.search_seeds)] or not self.search_seeds:
            raise ValueError(f"search_seeds={self.search_seeds} must be the first of seeds={self.seeds}")

    def search(self, arm: str) -> list[Run]:
        """The runs that choose an arm's rate; none when there is nothing to choose."""
        if len(self.rates[arm]) == 1:
            return []
        return [Run(arm, lr, seed) for lr in self.rates[arm] for seed in self.search_seeds]

    def final(self, arm: str, lr: float) -> list[Run]:
        """The runs that are tested: the chosen rate on every seed."""
        return [Run(arm, lr, seed) for seed in self.seeds]

    def size(self) -> int:
        """The number of training runs."""
        total = 0
        for arm in self.rates:
            searched = self.search(arm)
            total += len(searched) + len(self.seeds) - (len(self.search_seeds) if searched else 0)
        return total


@dataclass(frozen=True)
class Results:
    """What came out. Losses are in bits per byte.

    Attributes:
        outcomes: every training run, chosen or not.
        chosen: arm -> its learning rate.
        test: chosen run -> loss on the test split.
        untouched: the loss of the model before fine-tuning, on the test split.
        rebuilt: chosen run of a chain -> largest difference between the weights it left and the untouched
        model
            with its saved chain applied.
    """

    outcomes: Mapping[Run, Outcome]
    chosen: Mapping[str, float]
    test: Mapping[Run, float]
    untouched: float
    rebuilt: Mapping[Run, float]

    def final(self, arm: str) -> list[Outcome]:
        """The chosen runs of an arm, in the order of the seeds."""
        return [self.outcomes[run] for run in self.test if run.arm == arm]

    def losses(self, arm: str) -> list[float]:
        """Test losses of an arm, in the order of the seeds."""
        return [loss for run, loss in self.test.items() if run.arm == arm]


def compare(plan: Plan, tick: Callable[[str], Any] = lambda done: None) -> Results:
    """Carry out `plan`.

    Args:
        plan: what to compare.
        tick: called after every training run with one line about it, for a progress bar.
    """
    with _executor(plan.workers) as executor:
        try:
            outcomes, chosen = _train_all(plan, executor, tick)
            final = [run for arm, lr in chosen.items() for run in plan.final(arm, lr)]
            tests = [executor.submit(_test, run, plan) for run in final]
            rebuilds = {run: executor.submit(_rebuild, run, plan) for run in final if run.seed == plan.seeds[0]}
            untouched = executor.submit(_untouched, plan)
            test = {run: future.result() for run, future in zip(final, tests)}
            rebuilt = {run: future.result() for run, future in rebuilds.items()}
            return Results(
                outcomes,
                chosen,
                test,
                untouched.result(),
                {run: difference for run, difference in rebuilt.items() if difference is not None},
            )
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def choose(outcomes: Iterable[Outcome]) -> float:
    """The learning rate with the lowest validation loss, averaged over seeds; the lower rate of two that tie.

    Raises:
        ValueError: there is no outcome to choose from.
    """
    validation: dict[float, list[float]] = {}
    for outcome in outcomes:
        validation.setdefault(outcome.lr, []).append(outcome.validation)
    if not validation:
        raise ValueError("outcomes=[]: no run to choose a learning rate from")
    return min(sorted(validation), key=lambda lr: math.fsum(validation[lr]) / len(validation[lr]))


def _train_all(
    plan: Plan, executor: Executor, tick: Callable[[str], Any]
) -> tuple[dict[Run, Outcome], dict[str, float]]:
    outcomes: dict[Run, Outcome] = {}
    chosen = {arm: rates[0] for arm, rates in plan.rates.items() if len(rates) == 1}
    waiting: dict[Future[Outcome], Run] = {}

    def submit(runs: Sequence[Run]) -> None:
        for run in runs:
            if run not in outcomes and run not in waiting.values():
                waiting[executor.submit(_train, run, plan)] = run

    # the longest runs first, so that no process is left alone with one at the end
    for arm in sorted(plan.rates, key=lambda arm: ARMS[arm].policy is not None):
        submit(plan.search(arm) or plan.final(arm, chosen[arm]))
    while waiting:
        finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in finished:
            run = waiting.pop(future)
            outcomes[run] = future.result()
            tick(f"{ARMS[run.arm].title(plan.setting.adapters)}, lr {run.lr:g}, seed {run.seed}")
            if run.arm not in chosen and all(search in outcomes for search in plan.search(run.arm)):
                chosen[run.arm] = choose(outcomes[search] for search in plan.search(run.arm))
                submit(plan.final(run.arm, chosen[run.arm]))
    return outcomes, {arm: chosen[arm] for arm in plan.rates}


def _train(run: Run, plan: Plan) -> Outcome:
    model = tiny_opt.load(plan.model)
    folder = run.folder(plan.scratch)
    folder.mkdir(parents=True, exist_ok=True)
    outcome = fine_tune(model, ARMS[run.arm], run.lr, run.seed, plan.setting, _prose(), folder / "chain")
    save_model(model, str(folder / "weights.safetensors"))
    return outcome


def _test(run: Run, plan: Plan) -> float:
    return bits_per_byte(_tuned(run, plan), _prose().text["test"], plan.setting.context)


def _untouched(plan: Plan) -> float:
    return bits_per_byte(tiny_opt.load(plan.model), _prose().text["test"], plan.setting.context)


def _rebuild(run: Run, plan: Plan) -> float | None:
    folder = run.folder(plan.scratch) / "chain"
    if not folder.exists():  # the arm has no chain
        return None
    rebuilt = tiny_opt.load(plan.model)
    Chain.load(folder).apply(rebuilt)
    left = dict(_tuned(run, plan).named_parameters())
    return max((left[name] - value).abs().max().item() for name, value in rebuilt.named_parameters())


def _tuned(run: Run, plan: Plan) -> torch.nn.Module:
    model = tiny_opt.load(plan.model)
    load_model(model, str(run.folder(plan.scratch) / "weights.safetensors"))
    return model


@functools.cache
def _prose() -> corpus.Prose:
    return corpus.prose()


class _Here(Executor):
    """An executor that runs each call at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _executor(workers: int) -> Executor:
    if workers < 1:
        raise ValueError(f"workers={workers}: at least one process is needed")
    if workers == 1:
        return _Here()
    # a forked copy of a process that has used torch's thread pool may hang
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread)


def _one_thread() -> None:
    torch.set_num_threads(1)
    # numbers below fp32's normal range are a hundred times slower, and nothing depends on them
    torch.set_flush_denormal(True)
    tiny_opt.quiet()
