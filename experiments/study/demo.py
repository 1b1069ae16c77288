"""The demo: LoRA, chains of LoRAs and full fine-tuning on the same text for the same epochs, offline, in minutes.

A tiny OPT that knows Python code is fine-tuned to English prose, the chapters of the Python language reference. The
demo is a preset of the study: its own arms, text that every epoch cuts elsewhere, a rate that falls late and rises anew
after every knot. It adds checks, a picture and the chains.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.command_line import repeated
from experiments.files import write_atomically
from experiments.hardware import cores
from experiments.study import arms
from experiments.study.arms import CONTROL, DEMO, REFERENCE, Arm
from experiments.study.cells import CHAIN, StudyCell, name, run
from experiments.study.comparison import Plan, Results, rows
from experiments.study.demo_plot import draw
from experiments.study.demo_report import checks, record, statements
from experiments.study.setting import Setting
from experiments.study.table import demo_table
from experiments.sweep import Outcome, Sweep, SweepError
from experiments.tiny import tiny_opt

NEARBY = 2
"""The number of rates around the recorded one that a default run tries."""


def preset(**changes: Any) -> Setting:
    """The demo's setting, with changes to its fields."""
    setting = Setting(
        str(tiny_opt.COMMITTED), epochs=3, held_out=None, batch_size=2, train_bytes=36_864, warmup=15, decay=0.5,
        by_epoch=False, keep_chains=True,
    )  # fmt: skip
    return dataclasses.replace(setting, **changes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m experiments demo`."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 3; with --full 5)")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=DEMO,
        metavar="ARM",
        help=f"which to compare: {', '.join(DEMO)} (default: all, {CONTROL} only with --full)",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="all learning rates of the grid, each on two seeds, all arms, 5 seeds; "
        f"a default run tries the {NEARBY} rates nearest to the recorded best on one seed",
    )
    parser.add_argument(
        "--model", type=Path, default=tiny_opt.COMMITTED, help="the untouched model (default: tiny-opt)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, cores()),
        help="processes of one thread each (default: one per core, %(default)s)",
    )
    parser.add_argument("--smoke", action="store_true", help="a trial: a few steps of a random, smaller model")

    default = preset()
    other = parser.add_argument_group("another setting", "the recorded rates belong to the defaults")
    other.add_argument("--rates", nargs="+", type=float, metavar="LR", help="rates to choose from, for every arm")
    other.add_argument("--rank", type=int, default=8, help="of the adapters (default: %(default)s)")
    targets = list(default.targets)
    other.add_argument("--targets", nargs="+", default=targets, metavar="NAME", help="layers, or all-linear (q and v)")
    other.add_argument("--init", default=default.init, help="how A is drawn (default: %(default)s)")
    other.add_argument("--epochs", type=int, default=default.epochs, help="passes over the text (default: %(default)s)")
    other.add_argument("--bytes", type=int, default=default.train_bytes, help="of prose (default: %(default)s)")
    other.add_argument("--batch", type=int, default=default.batch_size, help="blocks per step (default: %(default)s)")
    other.add_argument("--warmup", type=int, default=default.warmup, help="steps, of every link (default: %(default)s)")
    other.add_argument("--decay", type=float, default=default.decay, help="share of the run, at its end (%(default)s)")


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m experiments demo`: 0 if every check holds, else 1; 2 for bad arguments."""
    started = time.perf_counter()
    tiny_opt.quiet()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"demo: --out {arguments.out} cannot be made: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=arguments.out) as scratch:
        try:
            plan = make_plan(arguments, Path(scratch))
        except (FileNotFoundError, ValueError) as error:
            print(f"demo: {error}", file=sys.stderr)
            return 2
        print(_announcement(plan, arguments))
        # in a temporary folder, so that a demo always runs
        sweep = Sweep(Path(scratch), run, name)
        try:
            done = sweep.carry_out(
                plan.wanted, workers=arguments.workers, threads=1, expected=plan.cells(), finished=refuse_divergence
            )
        except (FloatingPointError, SweepError, ValueError) as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1
        results = Results(plan, done, plan.setting.per_nat)
        _keep_chains(results, sweep, arguments.out / "chains")
        found = rows(results)
        verdicts = checks(results, found, learned=not arguments.smoke)
        minutes, cpu_minutes = (time.perf_counter() - started) / 60, sum(os.times()[:4]) / 60
        command = repeated("demo", add_arguments, arguments, without=("out", "workers"))
        written = record(results, found, verdicts, minutes, cpu_minutes, command, arguments.workers)
    write_atomically(arguments.out / "results.json", json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    write_atomically(arguments.out / "table.txt", demo_table(found) + "\n")
    draw(results, found, arguments.out / "curves.png")
    print(f"\nuntouched model: {results.untouched:.4f} bits per byte on the test topics\n\n{demo_table(found)}\n")
    if REFERENCE in plan.arms and len(found) > 1:
        print("Against LoRA, paired by seed, t test, Holm's correction at 5 %:")
        print("\n".join(f"  {said}" for said in statements(found)))
    print("\nChecks:")
    for check in verdicts:
        print(f"  {'ok  ' if check.holds else 'FAIL'} {check.what} ({check.found})")
    print(f"\n{arguments.out}/: results.json, table.txt, curves.png, chains/")
    print(f"{minutes:.1f} minutes; {cpu_minutes:.1f} minutes of one core")
    return 0 if all(check.holds for check in verdicts) else 1


def make_plan(arguments: argparse.Namespace, scratch: Path) -> Plan:
    """The plan that the arguments describe.

    Raises:
        ValueError: a number out of range, or an arm that the model cannot carry.
        FileNotFoundError: the model is missing.
    """
    count = arguments.seeds if arguments.seeds is not None else 5 if arguments.full else 2 if arguments.smoke else 3
    for option, value in (("--seeds", count), ("--workers", arguments.workers)):
        if value < 1:
            raise ValueError(f"{option}={value}: at least 1 is needed")
    seeds = tuple(range(arguments.seed, arguments.seed + count))
    wanted = arguments.arms or [arm for arm in DEMO if arguments.full or arm != CONTROL]
    chosen = {name: arm for name, arm in arms.demo(arguments.rank).items() if name in wanted}
    rates = {name: _rates(arm, arguments) for name, arm in chosen.items()}
    search = seeds[: 2 if arguments.full else 1]
    if arguments.smoke:
        model = scratch / "model"
        tiny_opt.save(tiny_opt.fresh(tiny_opt.config(width=32, layers=1, heads=2, context=32), seeds[0]), model, {})
        setting = preset(model=str(model), epochs=2, train_bytes=2048, context=32, batch_size=8, warmup=1)
    else:
        setting = _setting(arguments)
    plan = Plan(chosen, rates, search, seeds, setting, test_untouched=True)
    plan.require_possible()
    return plan


def refuse_divergence(cell: StudyCell, outcome: Outcome) -> None:
    """Stop the demo at a run that diverged.

    Raises:
        FloatingPointError: the message names the run.
    """
    if "diverged" in outcome:
        raise FloatingPointError(f"{cell.method.name}, lr={cell.lr:g}, seed={cell.seed}: {outcome['diverged']}")


def _announcement(plan: Plan, arguments: argparse.Namespace) -> str:
    rates = "the whole grid of rates" if arguments.full else f"the {NEARBY} rates nearest to the recorded best"
    if arguments.rates:
        rates = f"the rates {', '.join(f'{rate:g}' for rate in sorted(arguments.rates))}"
    return (
        f"{len(plan.arms)} arms, seeds {', '.join(map(str, plan.seeds))}, {plan.setting.epochs} epochs of "
        f"{len(plan.setting.training_text()):,} bytes of prose; "
        f"{plan.size()} runs in {arguments.workers} processes.\n"
        f"Learning rate: per arm, from {rates}, by validation loss over {len(plan.search_seeds)} seed(s)"
        f"{'' if arguments.full else '; --full searches the whole grid'}."
    )


def _setting(arguments: argparse.Namespace) -> Setting:
    return preset(
        model=str(arguments.model),
        epochs=arguments.epochs,
        train_bytes=arguments.bytes,
        batch_size=arguments.batch,
        warmup=arguments.warmup,
        decay=arguments.decay,
        targets=tuple(arguments.targets),
        init=arguments.init,
    )


def _rates(arm: Arm, arguments: argparse.Namespace) -> tuple[float, ...]:
    if arguments.rates:
        if not all(math.isfinite(rate) and rate > 0 for rate in arguments.rates):
            raise ValueError(f"--rates {' '.join(map(str, arguments.rates))}: positive numbers")
        return tuple(sorted(set(arguments.rates)))
    return arm.rates if arguments.full else arm.nearby(NEARBY)


def _keep_chains(results: Results, sweep: Sweep[StudyCell], target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for arm in results.plan.arms:
        chain = sweep.place(results.chosen(arm)[0]) / CHAIN
        if chain.exists():
            shutil.copytree(chain, target / arm)
