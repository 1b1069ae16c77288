"""Reproduce one of the paper's eight tables, or one of our own: run the missing cells, then print and write the table.

    python -m experiments table 1                      as in the paper: OPT-1.3B, data from the hub, five seeds
    python -m experiments table 4 --tasks cb --seeds 2 a part of a table
    python -m experiments table 1 --smoke              a trial on made-up data, minutes on two cores
    python -m experiments table prompting --model smollm2   no training, on all eleven tasks
    torchrun --nproc-per-node 4 -m experiments table 2 --fsdp

All tables share one folder of runs, so a run that two tables need is run once. A command that was stopped goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments import hardware, models
from experiments.command_line import add_whereabouts, count, repeated, search_seeds, seed
from experiments.methods import QUERY_AND_VALUE
from experiments.paper import cells, flops, score_table, tables
from experiments.paper.cells import Cell
from experiments.paper.own_tables import OWN_TABLES
from experiments.paper.tables import TABLES, PaperTable, Place, Setting
from experiments.sweep import Outcome, RateSearch, Sweep, SweepError, requested
from experiments.sweep.processes import processes
from experiments.sweep.tensorboard import Board
from experiments.tasks import synthetic
from experiments.tiny import tiny_opt

SMOKE = Setting(
    seeds=(0, 1), search_seeds=(0,), rates=2, train=8, dev=4, test=6, epochs=3, max_length=128
)  # fmt: skip
"""The size of a smoke run. Three links need three epochs."""

_TABLES = {**{str(number): table for number, table in TABLES.items()}, **OWN_TABLES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m experiments table`."""
    parser.add_argument(
        "table",
        choices=list(_TABLES),
        metavar="TABLE",
        help=f"one of the paper's, 1 to {len(TABLES)}, or of our own: {', '.join(OWN_TABLES)}",
    )
    add_run_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that tables and figures share."""
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), metavar="DIR", help="folder to write")
    parser.add_argument("--model", metavar="MODEL", help="a folder, a hub name, tiny or smollm2 (default: the paper's)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="the first seed")
    parser.add_argument("--seeds", type=count, metavar="N", help="number of seeds (default: 5; 2 with --smoke)")
    add_whereabouts(parser)
    parser.add_argument("--tensorboard", action="store_true", help="also write OUT/tensorboard")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model, made-up data unless --data-dir, few samples"
    )

    part = parser.add_argument_group("a part of the table", "all but --tasks and --lines make other cells")
    part.add_argument("--tasks", nargs="+", metavar="TASK", help="such as cb wsc (default: the table's)")
    part.add_argument("--lines", nargs="+", metavar="LINE", help="labels of lines, such as LoRA COLA (default: all)")
    part.add_argument("--rates", type=count, metavar="N",
                      help="how many of a line's learning rates to try, from the largest (default: all)")  # fmt: skip
    part.add_argument(
        "--search-seeds", type=count, metavar="N",
        help="how many of the seeds, from the first on, choose the rates (default: all; 1 with --smoke)",
    )  # fmt: skip
    for size, what in (("train", "training"), ("dev", "development"), ("test", "test")):
        part.add_argument(
            f"--{size}", type=count, metavar="N", help=f"at most so many {what} examples (default: the paper's)"
        )
    part.add_argument(
        "--epochs", type=count, metavar="N", help="passes over the training examples (default: the paper's 5)"
    )

    cells.add_arguments(parser)
    parser.add_argument(
        "--bias",
        action=argparse.BooleanOptionalAction,
        help="train the adapted layers' biases (default: as the paper does)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m experiments table`: 0; 1 if a run diverged; 2 for bad arguments."""
    result = reproduce(_TABLES[arguments.table], arguments, f"table {arguments.table}")
    if isinstance(result, int):
        return result
    if not result.shown:
        return result.status
    paths = result.table.write(
        arguments.out / f"table{'-' * (not arguments.table.isdecimal())}{arguments.table}", **result.about
    )
    print(result.table.text())
    return result.end(paths)


@dataclass(frozen=True)
class Result:
    """A table that has been run.

    Attributes:
        table: with the outcomes that there are.
        lacking: a phrase for every entry without all its scores.
        about: command, setting and hardware, for the files.
        shown: True in the first of `torchrun`'s processes; only that one prints.
    """

    table: score_table.Table
    lacking: tuple[str, ...]
    about: Mapping[str, Any]
    shown: bool = True

    @property
    def status(self) -> int:
        """The exit status of the command: 1 if anything is lacking."""
        return 1 if self.lacking else 0

    def end(self, paths: list[Path]) -> int:
        """Print the paths written and the entries that are lacking, and return the exit status."""
        print(f"\n{', '.join(map(str, paths))}\n{self.about['minutes']:.1f} minutes")
        for phrase in self.lacking:
            print(f"FAIL {phrase}", file=sys.stderr)
        return self.status


def reproduce(table: PaperTable, arguments: argparse.Namespace, command: str) -> Result | int:
    """Run the cells of `table` that are missing.

    Args:
        table: the table.
        arguments: of `add_run_arguments`.
        command: its name, for messages and files.

    Returns:
        The table, or after a printed error the exit status.
    """
    started = time.perf_counter()
    tiny_opt.quiet()
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        cluster = requested(arguments)
        setting = make_setting(table, arguments)
        found = tables.searches(table, setting)
        per_token = _flops_per_token(table, setting)
        sweep = _sweep(arguments.out)
        board = Board(sweep, arguments.out / "tensorboard") if arguments.tensorboard else None
        if any(sweep.read(cell) is None for search in found.values() for cell in search.wanted({})):
            models.require(setting.model or table.model)  # before processes are started
        if first:
            print(f"{command}: {_size(found.values())} runs, in {arguments.out / 'cells'}")
        done = sweep.carry_out(
            lambda done: [cell for search in found.values() for cell in search.wanted(done)],
            # a cell that is spread over GPUs or processes runs alone; a cluster gives it GPUs of its own
            workers=1 if processes() > 1 or (arguments.device_map and not cluster) else arguments.workers,
            cluster=cluster,
            expected=_size(found.values()),
            progress=first,
            finished=board if board and first else (lambda cell, outcome: None),
        )
    except (ModuleNotFoundError, OSError, ValueError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except SweepError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    filled = tables.fill(table, setting, done, found, per_token)
    minutes = (time.perf_counter() - started) / 60
    about = {
        "command": repeated(command, add_run_arguments, arguments),
        "setting": {name: value for name, value in vars(setting).items() if value is not None},
        "minutes": minutes,
        **hardware.provenance(),
    }
    return Result(filled, tuple(_lacking(found, done)), about, first)


def make_setting(table: PaperTable, arguments: argparse.Namespace) -> Setting:
    """The setting that the arguments describe; with --smoke, the model and the data are made if they do not exist.

    Raises:
        ValueError: a number out of range.
    """
    base = SMOKE if arguments.smoke else Setting()
    seeds = tuple(range(arguments.seed, arguments.seed + (arguments.seeds or len(base.seeds))))
    search = arguments.search_seeds or (base.search_seeds and len(base.search_seeds))
    given = {
        name: getattr(arguments, name)
        for name in ("model", "rates", "train", "dev", "test", "epochs", "bias")
        if getattr(arguments, name) is not None
    }
    setting = replace(
        base,
        seeds=seeds,
        search_seeds=search_seeds(seeds, search) if search else None,
        tasks=tuple(arguments.tasks) if arguments.tasks else None,
        labels=tuple(arguments.lines) if arguments.lines else None,
        **cells.circumstances(arguments),
        **given,
    )
    return _smoke(setting, table, arguments.out) if arguments.smoke else setting


def _smoke(setting: Setting, table: PaperTable, out: Path) -> Setting:
    if setting.model is None:
        model = out / "smoke-model"
        if not (model / "provenance.json").exists():
            shape = tiny_opt.config(width=64, layers=1, heads=2, context=setting.max_length)
            tiny_opt.save(tiny_opt.fresh(shape, seed=0), model, {"made_by": "--smoke", "weights": "random"})
        setting = replace(setting, model=str(model))
    if setting.data_dir is None:
        data = out / "smoke-data"
        # larger than any seed's sample
        synthetic.write(data, table.tasks, train=24, validation=12)
        setting = replace(setting, data_dir=str(data))
    return setting


def _sweep(out: Path) -> Sweep[Cell]:
    from experiments.paper.finetune import run

    return Sweep(out, run, cells.name)


def _size(searches: Iterable[RateSearch[Cell]]) -> int:
    """The number of runs; equal entries share theirs."""
    return sum(
        {frozenset(search.cell(lr, seed) for lr in search.rates for seed in search.seeds): search.size()
         for search in searches}.values()
    )  # fmt: skip


def _lacking(found: Mapping[Place, RateSearch[Cell]], done: Mapping[Cell, Outcome]) -> list[str]:
    """A phrase for every entry that lacks scores."""
    phrases = []
    for (label, name), search in found.items():
        entry = tables.entry(search, done)
        absent = [seed for seed in search.seeds if seed not in entry.finite]
        if absent:
            phrases.append(f"{label}, {name}: no score for seed {', '.join(map(str, absent))}")
    return phrases


def _flops_per_token(table: PaperTable, setting: Setting) -> int | None:
    """The adapters' FLOPs per token and rank; None if no column needs them, or if they cannot be counted."""
    if not table.saves:
        return None
    from transformers import AutoConfig

    model = setting.model or table.model
    models.require(model)
    config = AutoConfig.from_pretrained(models.folder(model))
    try:
        return flops.per_token_and_rank(config, setting.targets or QUERY_AND_VALUE)
    except ValueError as error:
        print(f"FLOPs saved will be missing: {error}", file=sys.stderr)
        return None
