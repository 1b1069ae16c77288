"""The offline study: LoRA, chains and full fine-tuning of a small model on text, with tuned rates and paired seeds.

    python -m experiments study                                                    tiny OPT, from code to prose
    python -m experiments study --model DIR --corpus FILE --length 128 --batch 8   any small causal model and text

Every arm's learning rate is chosen on the development split. Every seed is then run with it, and only those runs are
evaluated on the test split. A study that was stopped goes on where it was; `--cluster` spreads it over machines.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

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
from experiments.methods import QUERY_AND_VALUE
from experiments.study import control
from experiments.study.arms import STUDY
from experiments.study.cells import name, needs, run
from experiments.study.comparison import Plan, Results, rows
from experiments.study.record import record
from experiments.study.setting import Setting
from experiments.study.table import study_table
from experiments.sweep import Sweep, SweepError, requested
from experiments.tiny import tiny_opt

TARGETS = {"qv": QUERY_AND_VALUE, "all-linear": ("all-linear",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m experiments study`."""
    default = Setting()
    parser.add_argument("--out", type=Path, default=Path("runs/study"), metavar="DIR", help="folder to write")
    parser.add_argument("--model", default=default.model, metavar="MODEL",
                        help="a folder, a hub name, smollm2, or tiny, the committed tiny OPT")  # fmt: skip
    parser.add_argument("--corpus", default=default.corpus, metavar="FILE",
                        help="a text file, or the prose or code that Python carries")  # fmt: skip
    parser.add_argument("--targets", default="qv", choices=list(TARGETS),
                        help="layers with adapters: query and value, or all linear ones")  # fmt: skip
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"of {', '.join(STUDY)} (default: all)")
    add_seeds(parser, 5)
    add_search_seeds(parser)
    parser.add_argument("--epochs", type=count, default=default.epochs, metavar="N", help="passes")
    parser.add_argument("--train", type=count, default=default.train, metavar="N", help="training blocks")
    parser.add_argument("--held-out", type=count, default=default.held_out, metavar="N",
                        help="blocks per held-out split")  # fmt: skip
    parser.add_argument("--length", type=count, default=default.context, metavar="N", help="tokens per block")
    parser.add_argument("--batch", type=count, default=default.batch_size, metavar="N", help="blocks per step")
    names = ", ".join(control.arms())
    parser.add_argument("--control", action="store_true", help=f"a short run where rank does not bind; arms: {names}")
    parser.add_argument("--smoke", action="store_true", help="a trial: two arms, two seeds, a few steps")
    add_whereabouts(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m experiments study`.

    Returns:
        0; 1 if a run that counts diverged; 2 for bad arguments or arms that the model cannot carry.
    """
    tiny_opt.quiet()
    try:
        plan, cluster = make_plan(arguments), requested(arguments)
        plan.require_possible()
    except (ValueError, OSError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    sweep = Sweep(arguments.out, run, name, needs)
    try:
        done = sweep.carry_out(plan.wanted, workers=arguments.workers, cluster=cluster, expected=plan.cells())
    except OSError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    except (SweepError, ValueError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    found = rows(Results(plan, done, plan.setting.per_nat))
    shown = study_table(found, plan.setting.unit)
    stem = arguments.out / f"study-{'control' if arguments.control else arguments.targets}"
    write_atomically(stem.with_suffix(".md"), shown + "\n")
    command = repeated("study", add_arguments, arguments, without=(*WHEREABOUTS, "out"))
    write_json(stem.with_suffix(".json"), record(plan, found, command))
    print(shown)
    missing = [arm for arm in plan.arms if arm not in {row.arm for row in found}]
    if missing:
        print(f"diverged: {', '.join(missing)}", file=sys.stderr)
    print(f"\n{stem}.md, {stem}.json; one folder per run in {arguments.out / 'cells'}")
    return 1 if missing else 0


def make_plan(arguments: argparse.Namespace) -> Plan:
    """The plan that the arguments describe.

    Raises:
        ValueError: a number out of range.
    """
    sizes = (arguments.epochs, arguments.train, arguments.held_out, arguments.length, arguments.batch)
    setting = Setting(arguments.model, arguments.corpus, TARGETS[arguments.targets], *sizes)
    seeds = seeds_of(arguments)
    known = control.arms() if arguments.control else STUDY
    if arguments.control:
        fixed = ("model", "corpus", "targets", "epochs", "train", "held_out", "length", "batch")
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        given = [name for name in fixed if getattr(arguments, name) != parser.get_default(name)]
        if given:
            raise ValueError(f"--control sets the setting: leave out --{' and --'.join(given).replace('_', '-')}")
        setting = control.preset()
    names = arguments.arms or list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--arms {' '.join(unknown)}: choose from {', '.join(known)}")
    chooses = search_seeds(seeds, arguments.search_seeds)
    if arguments.smoke:
        names, seeds, chooses = arguments.arms or ["lora", "cola-2"], seeds[:2], chooses[:2]
        setting = replace(setting, epochs=2, train=4, held_out=2, context=16, batch_size=2, train_bytes=None)
    arms = {name: known[name] for name in names}
    rates = {name: (arm.start,) if arguments.smoke else arm.rates for name, arm in arms.items()}
    return Plan(arms, rates, chooses, seeds, setting, walk=True)
