"""The frontier: held-out loss against bytes of trained state, a curve per method over ranks.

    python -m experiments frontier --task demo
    python -m experiments frontier --task shakespeare --model DIR --corpus FILE

Every arm's learning rate is tuned by factors of two to an inner optimum on the development split, from a first rate and
its two neighbours, on one seed or more (``--search-seeds``). All seeds are then run with it, and tested once. A run
that was stopped goes on where it was.

Where there are chains of several lengths, a second picture shows their losses against the number of links.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.command_line import (
    WHEREABOUTS,
    add_search_seeds,
    add_seeds,
    add_whereabouts,
    count,
    repeated,
    search_seeds,
    seeds_of,
)
from experiments.files import write_atomically, write_json
from experiments.frontier import families
from experiments.frontier.families import FAMILIES, FULL, lora
from experiments.frontier.picture import draw_frontier, draw_lengths, lengths
from experiments.frontier.tasks import TASKS, Gate, Task, lasting, require_text, room
from experiments.report import style
from experiments.study.cells import name, needs, run
from experiments.study.comparison import Plan, Results, Row, rows
from experiments.study.record import record
from experiments.study.setting import Setting
from experiments.study.table import frontier_table
from experiments.sweep import Cluster, Sweep, SweepError, gather, requested
from experiments.tiny import tiny_opt

USUAL = ("lora", "chain-5", families.SELECTED)
"""The families that are compared if none are named."""
UNTOLD = (*WHEREABOUTS, "out", "so_far")
"""The options that a recorded command leaves out, because results do not depend on them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m experiments frontier`."""
    add_task(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"), metavar="DIR", help="folder to write")
    parser.add_argument("--ranks", type=count, nargs="+", default=[2, 4, 8, 16], metavar="R", help="of the LoRAs")
    parser.add_argument("--steps", type=count, metavar="N", help="optimizer steps of a run (default: the task's)")
    parser.add_argument("--no-gate", action="store_true", help="leave out full fine-tuning and LoRA of rank 3r")
    add_sweep(parser)


def add_task(parser: argparse.ArgumentParser) -> None:
    """The options that name a task."""
    parser.add_argument(
        "--task", choices=list(TASKS), default="demo", help="the model, the data and the length of a run"
    )
    parser.add_argument("--model", metavar="MODEL",
                        help="a folder, a hub name or smollm2; shakespeare and code need one")  # fmt: skip
    parser.add_argument("--corpus", metavar="FILE", help="a text file; shakespeare needs one")
    parser.add_argument("--methods", nargs="+", choices=list(FAMILIES), default=list(USUAL), metavar="METHOD",
                        help=f"of {', '.join(FAMILIES)}")  # fmt: skip


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """The options that say how many runs there are and where."""
    add_seeds(parser, 5)
    add_search_seeds(parser)
    parser.add_argument("--so-far", action="store_true", help="run nothing, and show what is complete")
    add_whereabouts(parser)


def task_of(arguments: argparse.Namespace) -> Task:
    """The task that the arguments name.

    Raises:
        ValueError: it needs a model or a text, or has no use for one.
    """
    task = TASKS[arguments.task]
    given = {name: getattr(arguments, name) for name in ("model", "corpus") if getattr(arguments, name)}
    needed = {"shakespeare": {"model", "corpus"}, "code": {"model"}}.get(arguments.task, set())
    if missing := needed - set(given):
        raise ValueError(f"--task {arguments.task} needs --{' and --'.join(sorted(missing))}")
    if given and not isinstance(task, Setting):
        raise ValueError(f"--task {arguments.task} makes its own model and data: leave out --{' and --'.join(given)}")
    return replace(task, **given) if isinstance(task, Setting) else task


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m experiments frontier`: 0; 1 if a run failed or is missing; 2 for bad arguments."""
    tiny_opt.quiet()
    try:
        task = task_of(arguments)
        if arguments.steps is not None:
            task = lasting(task, arguments.steps, room(task))
            require_text(task, arguments.steps)
        chosen = families.arms(arguments.ranks, arguments.methods, gate=not arguments.no_gate)
        plan, cluster = plan_of(task, chosen, arguments), requested(arguments)
        plan.require_possible("--ranks, --steps or --methods" + ("" if arguments.no_gate else ", or --no-gate"))
    except (ValueError, OSError) as error:
        print(f"frontier: {error}", file=sys.stderr)
        return 2
    try:
        results = carry_out(plan, arguments, cluster)
    except (OSError, SweepError) as error:
        print(f"frontier: {error}", file=sys.stderr)
        return 1
    found = rows(results)
    if not found:
        print("frontier: no arm is complete yet", file=sys.stderr)
        return 1
    shown = [frontier_table(found, task.unit), *gates(found, arguments.ranks, task.per_nat)]
    stem = arguments.out / f"frontier-{arguments.task}-{task.steps()}"
    write_atomically(stem.with_suffix(".md"), "\n\n".join(shown) + "\n")
    command = repeated("frontier", add_arguments, arguments, without=UNTOLD)
    write_json(stem.with_suffix(".json"), record(plan, found, command))
    print("\n\n".join(shown))
    missing = [arm for arm in plan.arms if arm not in {row.arm for row in found}]
    if missing:
        print(f"not complete yet, or diverged: {', '.join(missing)}", file=sys.stderr)
    print(f"\n{stem}.md, .json; one folder per run in {arguments.out / 'cells'}")
    by_links = lengths(found)
    pictures = {".png": lambda path: draw_frontier(found, task.unit, path)}
    if max(map(len, by_links.values()), default=0) > 1:
        pictures["-links.png"] = lambda path: draw_lengths(by_links, task.unit, path)
    Path(f"{stem}-links.png").unlink(missing_ok=True)  # an earlier command's
    print("\n".join(dict.fromkeys(style.picture(Path(f"{stem}{end}"), draw) for end, draw in pictures.items())))
    return 1 if missing and not arguments.so_far else 0


def plan_of(task: Task, chosen: Mapping[str, Any], arguments: argparse.Namespace) -> Plan:
    """Arms on a task, each with a rate tuned on the first seeds.

    Raises:
        ValueError: `--search-seeds` exceeds `--seeds`.
    """
    rates, seeds = {name: arm.rates for name, arm in chosen.items()}, seeds_of(arguments)
    return Plan(chosen, rates, search_seeds(seeds, arguments.search_seeds), seeds, task, walk=True)


def carry_out(plan: Plan, arguments: argparse.Namespace, cluster: Cluster | None) -> Results:
    """The outcomes of the plan's runs; with `--so-far` of those that are done.

    Raises:
        SweepError: a process died, or an outcome cannot be read.
    """
    sweep = Sweep(arguments.out, run, name, needs)
    if arguments.so_far:
        done = gather(sweep.read, [plan.part([arm]).wanted for arm in plan.arms])
    else:
        done = sweep.carry_out(
            plan.wanted, workers=arguments.workers, threads=1, cluster=cluster, expected=plan.cells()
        )
    return Results(plan, done, plan.setting.per_nat)


def gates(found: Sequence[Row], ranks: Sequence[int], per_nat: float) -> list[str]:
    """One sentence per rank for which full fine-tuning and LoRA of rank 3r were run.

    Args:
        found: with losses in units of which a nat has ``per_nat``.
        ranks: of the LoRAs.
        per_nat: see there.
    """
    means = {row.arm: row.test.mean / per_nat for row in found}
    said = []
    for rank in ranks:
        if {lora(rank), lora(3 * rank), FULL} <= set(means):
            gap = means[lora(rank)] - means[FULL]
            said.append(f"r = {rank}: {Gate(gap, (means[lora(rank)] - means[lora(3 * rank)]) / gap)}")
    return said
