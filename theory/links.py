"""Links side by side on one real run: ``python -m theory.links``.

Trained links, and the best vertices of three balls, are tied from the same weights at equal budgets. The same fixed
loss measures each: what the best vertex of its size would promise to first order, what the link promises, what
curvature takes, and what is left. `theory.real_run.kinds` has the kinds of links.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from theory.command_line import Help, make_folder, progress, require

if __name__ == "__main__":
    require("numpy", "scipy", "torch")  # before the modules that import them

import torch
from torch import Tensor, nn

from theory.arguments import count
from theory.real_run.kinds import Task, kinds
from theory.real_run.side_by_side import Budget, Measured, run_links, table, tuned

TUNING_SEED = 1 << 20
"""Of the runs that choose the sizes: far from the measured seeds."""

ALL = ["all-linear"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m theory.links",
        description="Tie trained links and best vertices from the same weights, at equal budgets, and compare them.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    out.add_argument(
        "--model",
        default="demo",
        metavar="NAME",
        help="demo (tiny OPT, from prose to code), random (a small network), smollm2, or a folder or hub name",
    )
    out.add_argument(
        "--targets",
        nargs="+",
        default=ALL,
        metavar="NAME",
        help="names of a language model's layers that get links, such as q_proj v_proj",
    )
    out.add_argument("--links", type=int, default=3, metavar="N", help="links of a run")
    out.add_argument("--steps", type=int, default=100, metavar="N", help="batches per link: a gradient of each")
    out.add_argument("--rank", type=int, default=4, metavar="R", help="rank of trained, capped and random links")
    out.add_argument("--seeds", type=int, default=3, metavar="N", help="runs per kind")
    out.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed, of data and draws")
    out.add_argument("--workers", type=int, default=1, metavar="N", help="kinds at a time, a process each")
    out.add_argument("--out", type=Path, default=Path("runs/links"), metavar="DIR", help="folder of the results")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if a decomposition is off by more than rounding, or 2 for a bad argument."""
    options = parser().parse_args(arguments)
    try:
        count("--links", options.links, "links of a run")
        count("--steps", options.steps, "batches per link; one of several finds the gradient's directions", least=2)
        count("--rank", options.rank, "the rank of links")
        count("--seeds", options.seeds, "runs per kind")
        count("--seed", options.seed, "the first seed", least=0)
        count("--workers", options.workers, "kinds at a time")
        if options.model == "random" and options.targets != ALL:
            raise ValueError("--targets names layers of a language model: leave it out with --model random")
        make_folder(options.out)
        task = task_of(options.model, tuple(options.targets))
        if options.rank > min(task.ranks):
            raise ValueError(f"--rank must be at most {min(task.ranks)}, the rank of a layer, got {options.rank}")
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    task.restored()
    untouched, runs = task.mean_loss(task.fixed), list[Measured]()
    with (options.out / "results.jsonl").open("w", encoding="utf-8") as lines, results(options) as found:
        for _, of_kind in zip(progress(kinds(options.rank), "kind", lambda kind: kind.name), found):
            runs += of_kind
            for run in of_kind:
                lines.write(json.dumps({"model": options.model, "targets": options.targets, **run.as_dict()}) + "\n")
            lines.flush()
    print(table(runs, untouched))
    print(f"results: {options.out / 'results.jsonl'}")
    # the decomposition is float64 arithmetic: some thousand units in the last place over links and layers
    apart = [run for run in runs if run.off > 4096]
    for run in apart:
        print(f"FAIL {run.kind} (seed {run.seed}): the decomposition is off by {run.off:.3g} units of rounding")
    return 1 if apart else 0


@contextmanager
def results(options: argparse.Namespace) -> Iterator[Iterator[list[Measured]]]:
    """The runs of every kind, in their order: here, or in processes of their own."""
    work = partial(runs_of, options), range(len(kinds(options.rank)))
    if options.workers == 1:
        yield map(*work)
        return
    threads = max(1, torch.get_num_threads() // options.workers)
    with ProcessPoolExecutor(options.workers, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        yield pool.map(*work)


def runs_of(options: argparse.Namespace, place: int) -> list[Measured]:
    """One run per seed of the kind at a place in `kinds`, with its size tuned before."""
    task, kind = task_of(options.model, tuple(options.targets)), kinds(options.rank)[place]
    budget = Budget(options.links, options.steps, sketch=max(task.ranks))
    size = tuned(task, kind, budget, TUNING_SEED)
    runs = [run_links(task, kind, size, budget, options.seed + index) for index in range(options.seeds)]
    return [run for run in runs if run is not None]


@cache
def task_of(model: str, targets: tuple[str, ...]) -> Task:
    """The task of a ``--model``, made once in a process."""
    return random_network() if model == "random" else language_model(model, targets)


def language_model(name: str, targets: Sequence[str] = ALL) -> Task:
    """A language model of `experiments` with its text: the demo's task, or prose in blocks of 64 tokens.

    Args:
        name: ``"demo"``, ``"smollm2"``, a folder, or a name on the hub.
        targets: names of the layers that get links, or ``"all-linear"``.

    Raises:
        ImportError: transformers is missing.
        OSError: there is no such model.
        ValueError: the model has no layer of a name.
    """
    try:
        from cola import ChainOptimizer, LinkConfig, NeverKnots
        from experiments.frontier.tasks import TASKS
        from experiments.study import text
        from experiments.study.setting import Setting
    except ImportError as error:
        raise ImportError(f"--model {name} needs transformers ({error}): install it, or use --model random") from error
    demo = TASKS["demo"]
    assert isinstance(demo, Setting)
    setting = demo
    if name != "demo":
        setting = Setting(model=name, corpus=text.PROSE, train=2048, held_out=16, context=64, batch_size=2)
    model = setting.load()
    blocks = setting.blocks()
    link = LinkConfig(r=1, target_modules=targets[0] if list(targets) == ALL else list(targets))
    adapted = ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=link)
    layers = list(adapted.live.layers)
    adapted.finish(merge=False)

    def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    def batches(seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from blocks.train[torch.randperm(len(blocks.train), generator=generator)].split(setting.batch_size)

    def held_out(ids: Tensor) -> list[Tensor]:
        size = 4 * setting.batch_size
        return list(ids[: len(ids) // size * size][: 8 * size].split(size))

    return Task(model, layers, loss_of, batches, held_out(blocks.test), held_out(blocks.dev))


def random_network(seed: int = 0) -> Task:
    """A random two-layer network and a random teacher; it needs only torch."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(24, 12, generator=generator) / 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 12))

    def loss_of(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - torch.tanh(x @ teacher)).square().mean()

    def batches(seed: int) -> Iterator[Any]:
        own = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(32, 24, generator=own)

    first, second = (list(itertools.islice(batches(1 << place), 4)) for place in (21, 22))
    return Task(model, ["0", "2"], loss_of, batches, first, second)


if __name__ == "__main__":
    sys.exit(main())
