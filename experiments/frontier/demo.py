"""The demo: where rank binds and a run is long, a chain beats a LoRA of its bytes. Offline.

A tiny OPT that has read English prose is fine-tuned to the source of Python's standard library. The demo is one rank of
the frontier, at recorded learning rates. It can be stopped, and goes on when it is started again.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from experiments.command_line import add_seeds, count, repeated, seeds_of
from experiments.files import write_atomically, write_json
from experiments.frontier import families
from experiments.frontier.families import FULL, SELECTED, lora
from experiments.frontier.frontier import gates
from experiments.frontier.picture import draw_demo
from experiments.frontier.tasks import TASKS
from experiments.hardware import cores
from experiments.report import style
from experiments.report.progress import Progress
from experiments.study.cells import CHAIN, StudyCell, name, needs, run
from experiments.study.comparison import Plan, Results, Row, rows
from experiments.study.record import record
from experiments.study.setting import Setting
from experiments.study.table import demo_table
from experiments.sweep import Outcome, Sweep, SweepError
from experiments.tiny import tiny_opt

RANK = 4
"""Of the LoRA whose bytes the chain has."""

RATES = {lora(RANK): 3.2e-2, lora(3 * RANK): 1.6e-2, f"{SELECTED}-{RANK}": 1.6e-2, FULL: 8e-3}
"""The recorded best learning rates (RESULTS.md)."""

CHAINED = f"{SELECTED}-{RANK}"


@dataclass(frozen=True)
class Check:
    """A condition that must hold for the results to be worth reading."""

    what: str
    holds: bool
    found: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m experiments demo`."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder to write")
    add_seeds(parser, 3)
    parser.add_argument(
        "--workers", type=count, default=min(8, cores()), metavar="N",
        help="processes of one thread each, usually one per core",
    )  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="a trial: a few steps of a random, smaller model")


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m experiments demo`: 0 if every check holds, else 1; 2 for bad arguments."""
    started = time.perf_counter()
    tiny_opt.quiet()
    try:
        plan = make_plan(arguments.out, seeds_of(arguments), smoke=arguments.smoke)
    except (OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    sweep = Sweep(arguments.out, run, name, needs)
    try:
        kept = sum(sweep.read(cell) is not None for cell in plan.wanted({}))
        print(_announcement(plan, arguments.workers, kept), flush=True)
        done = sweep.carry_out(
            plan.wanted,
            workers=arguments.workers,
            threads=1,
            expected=plan.cells(),
            finished=Finished(plan.size() - kept, kept, arguments.workers),
        )
    except (FloatingPointError, OSError, SweepError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    results = Results(plan, done, plan.setting.per_nat)
    found = rows(results)
    verdicts = checks(results, found, learned=not arguments.smoke)
    minutes, cpu_minutes = (time.perf_counter() - started) / 60, sum(os.times()[:4]) / 60
    written = record(plan, found, repeated("demo", add_arguments, arguments, without=("out", "workers")))
    written |= {"checks": [asdict(check) for check in verdicts], "untouched": results.untouched}
    written |= {"minutes": round(minutes, 1), "cpu_minutes": round(cpu_minutes, 1), "processes": arguments.workers}
    write_json(arguments.out / "results.json", written)
    write_atomically(arguments.out / "table.txt", demo_table(found) + "\n")
    _keep_chain(results, sweep, arguments.out / "chain")
    print(f"\nuntouched model: {results.untouched:.4f} bits per byte on held-out files\n\n{demo_table(found)}\n")
    print("A trial: the figures mean nothing." if arguments.smoke else sentence(found, plan.setting.per_nat))
    print("\nChecks:")
    for check in verdicts:
        print(f"  {'ok  ' if check.holds else 'FAIL'} {check.what} ({check.found})")
    print(f"\n{arguments.out}/: results.json, table.txt, chain/; cells/ holds the runs: delete it to run anew")
    print(style.picture(arguments.out / "demo.png", lambda path: draw_demo(results, found, path)))
    print(f"{minutes:.1f} minutes{f', with {kept} runs from before' if kept else ''}")
    return 0 if all(check.holds for check in verdicts) else 1


def make_plan(out: Path, seeds: tuple[int, ...], *, smoke: bool = False) -> Plan:
    """LoRA, LoRA of three times the rank, the chain of B alone, full fine-tuning.

    Args:
        out: a small model goes there for a trial.
        seeds: of the comparison.
        smoke: a trial of a few steps.

    Raises:
        FileNotFoundError: the model is missing.
    """
    offered = families.arms([RANK], [SELECTED])
    chosen = {name: replace(offered[name], rates=(rate,), start=rate) for name, rate in RATES.items()}
    setting = TASKS["demo"]
    assert isinstance(setting, Setting)
    setting = replace(setting, keep_chains=True)
    if smoke:
        tiny_opt.save(tiny_opt.fresh(tiny_opt.config(32, 1, 2, 16), 0), out / "model", {})
        setting = replace(setting, model=str(out / "model"), train=160, held_out=8, context=16)
    plan = Plan(chosen, {name: arm.rates for name, arm in chosen.items()}, seeds[:1], seeds, setting,
                test_untouched=True)  # fmt: skip
    plan.require_possible()
    return plan


class Finished:
    """Told of every finished run: it stops the demo at one that diverged, and says after the first how long all take.

    Args:
        runs: training runs to do.
        kept: training runs that were done before; they are reported first.
        workers: processes.
    """

    def __init__(self, runs: int, kept: int, workers: int) -> None:
        self.runs, self.kept, self.workers = runs, kept, workers
        self.started, self.seen = time.perf_counter(), 0

    def __call__(self, cell: StudyCell, outcome: Outcome) -> None:
        """Take note of a run.

        Raises:
            FloatingPointError: it diverged; the message names the run.
        """
        if "diverged" in outcome:
            raise FloatingPointError(f"{cell.method.name}, lr={cell.lr:g}, seed={cell.seed}: {outcome['diverged']}")
        self.seen += 1
        if self.seen == self.kept + 1 and self.runs > 1:
            took = time.perf_counter() - self.started
            # as many runs at a time as there are processes
            left = took * (math.ceil(self.runs / self.workers) - 1)
            Progress.write(
                f"The first run took {in_words(took)} on this machine; the others need about {in_words(left)}."
            )


def in_words(seconds: float) -> str:
    """A duration to one unit.

    >>> in_words(42.3), in_words(100), in_words(3 * 3600)
    ('42 seconds', '2 minutes', '3 hours')
    """
    for size, unit in ((3600, "hour"), (60, "minute"), (1, "second")):
        if seconds >= 1.5 * size or size == 1:
            number = round(seconds / size)
            return f"{number} {unit}{'' if number == 1 else 's'}"
    raise AssertionError


def sentence(found: list[Row], per_nat: float) -> str:
    """What the results show, and where they would differ."""
    row = next(row for row in found if row.arm == CHAINED)
    lora_row = next(row for row in found if row.arm == lora(RANK))
    differences = [chain - alone for chain, alone in zip(row.tests, lora_row.tests)]
    difference = math.fsum(differences) / len(differences)
    agree = sum(value * difference > 0 for value in differences)
    p = "" if row.against is None or math.isnan(row.against.p) else f", p = {row.against.p:.2g} in a paired t test"
    gate = "".join(f"Here {said.partition(': ')[2]}.\n" for said in gates(found, [RANK], per_nat))
    return (
        f"{gate}At the bytes of LoRA r = {RANK} the chain's loss is {abs(difference):.4f} bits per byte "
        f"{'lower' if difference < 0 else 'higher'} (so with {agree} of {len(differences)} seeds{p}), "
        f"{row.gap:.0%} of the gap to full fine-tuning.\n"
        "Where rank does not bind, or a run is short, a chain costs: experiments/RESULTS.md has the map."
    )


def checks(results: Results, found: list[Row], learned: bool = True) -> list[Check]:
    """Whether the comparison can be trusted.

    Args:
        results: the outcomes.
        found: `rows(results)`.
        learned: also require that fine-tuning helped, and that rank binds; False for runs too short for either.
    """
    outcomes = [outcome for _, _, outcome in results.runs()]
    losses = [loss for outcome in outcomes for loss in outcome["losses"]]
    steps = results.plan.setting.steps()
    short = [outcome for outcome in outcomes if len(outcome["losses"]) != steps]
    worst = max((outcome["rebuilt"] for outcome in outcomes if outcome.get("rebuilt") is not None), default=0.0)
    verdicts = [
        Check("every loss is finite", all(map(math.isfinite, losses)), f"{len(losses)} steps"),
        Check("every run took the same steps", not short, f"{steps} steps, {len(short)} runs differ"),
        Check("saved chains rebuild the tuned weights", worst <= 1e-6, f"largest difference {worst:.1e}"),
    ]
    if learned:
        worse = [row.arm for row in found if not row.test.mean < results.untouched]
        verdicts.append(
            Check(
                "every arm beats the untouched model",
                not worse,
                f"untouched {results.untouched:.4f}, worse: {worse or 'none'}",
            )
        )
        verdicts += [
            Check("rank binds", said.endswith("rank binds"), said) for said in gates(found, [RANK], results.scale)
        ]
    return verdicts


def _announcement(plan: Plan, workers: int, kept: int) -> str:
    done = f", of which {kept} are done" if kept else ""
    return (
        f"{len(plan.arms)} arms, {len(plan.seeds)} seeds, {plan.setting.steps()} steps of "
        f"{plan.setting.batch_size} blocks, recorded learning rates; {plan.size()} runs, {workers} at a time{done}. "
        f"Progress counts {plan.cells()} cells: these runs, their scores and the untouched model's."
    )


def _keep_chain(results: Results, sweep: Sweep[StudyCell], target: Path) -> None:
    """Copy the first seed's chain to where a user finds it."""
    chain = sweep.place(results.chosen(CHAINED)[0]) / CHAIN
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        shutil.copytree(chain, Path(scratch) / "chain")
        shutil.rmtree(target, ignore_errors=True)
        (Path(scratch) / "chain").rename(target)
