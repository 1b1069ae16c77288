"""The cost of COLA against its peers and against the limits of arithmetic and bandwidth.

    python -m experiments bench
    python -m experiments bench --rows layer/fp32 tie knot

Contenders run interleaved, in a random order within each round, on the same number of threads. A row is the ratio
within rounds: its median, and its 10 % and 90 % points. Rows: layer, kinds, step, overhead, tie, compiled, knot, chain,
export, import, scaling, cost. bench.md, bench.json and, with scaling, scaling.png land in --out.

--gpu measures a GPU instead: layer, step, knot and chain in bf16 on the shapes of OPT-1.3B and Llama-2-7B, ties against
a copy of the weight, and cost. With --smoke it also runs without a GPU.

The exit status is 1 if a result is wrong (ours and a peer's differ), if a group of rows raised an error (the others
are still measured and written) or, with --strict, if a target is missed; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.bench import compiled, cost, export, gpu, kinds, knot, layer, report, scaling, step, tie
from experiments.bench.measure import CLOCKS, Row, Settings, warm_heap
from experiments.command_line import count, positive, seed
from experiments.models import require
from experiments.report.progress import Progress
from experiments.tiny import tiny_opt

GROUPS = (layer, kinds, step, tie, compiled, knot, export, scaling, cost)
ON_A_GPU = (gpu, cost)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m experiments bench`."""
    parser.epilog = __doc__
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="folder to write")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of data and of the order of runs")
    parser.add_argument("--rows", nargs="+", metavar="NAME",
                        help="rows to measure, by the start of their names (default: all)")  # fmt: skip
    parser.add_argument("--seconds", type=positive, default=3.0, metavar="S", help="to spend on a comparison")
    parser.add_argument("--threads", type=count, metavar="N", help="of torch (default: torch's own)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu is the process's own time, for one thread on a machine with other work",
    )
    parser.add_argument("--model", metavar="MODEL",
                        help=f"for cost: a folder, a hub name, tiny or smollm2 (default: {cost.MODEL})")  # fmt: skip
    parser.add_argument("--gpu", action="store_true", help="the rows of a GPU, measured there")
    parser.add_argument("--strict", action="store_true", help="exit with 1 also if a target is missed")
    parser.add_argument("--smoke", action="store_true", help="a trial with tiny sizes; the figures mean nothing")


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m experiments bench`; 1 if a result is wrong."""
    tiny_opt.quiet()
    refused = obstacle(arguments)
    if refused:
        print(refused, file=sys.stderr)
        return 2
    chosen = dict(cases(arguments.rows, arguments.gpu))
    settings = Settings(
        arguments.seed, arguments.seconds, arguments.smoke, arguments.clock, arguments.model, arguments.gpu
    )
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or before)
    warm_heap()
    started = time.perf_counter()
    rows: list[Row] = []
    failed: list[str] = []
    try:
        for name, measure in (bar := Progress(chosen.items(), unit="group", total=len(chosen))):
            bar.set_description(name)
            try:
                rows += measure(settings)
            except Exception:
                failed.append(name)  # keep the minutes spent on other rows
                bar.write(traceback.format_exc(), file=sys.stderr)
    finally:
        torch.set_num_threads(before)
    minutes = (time.perf_counter() - started) / 60
    print(report.write(rows, settings, arguments, minutes))
    if failed:
        print(f"not measured, for the errors above: {', '.join(failed)}", file=sys.stderr)
    wrong = [row.name for row in rows if row.right is False]
    missed = [row.name for row in rows if row.reached is False]
    if wrong:
        print(f"wrong results: {', '.join(wrong)}", file=sys.stderr)
    if arguments.strict and missed:
        print(f"missed targets: {', '.join(missed)}", file=sys.stderr)
    return int(bool(wrong or failed) or (arguments.strict and bool(missed)))


def obstacle(arguments: argparse.Namespace) -> str | None:
    """The reason why a run with these arguments is impossible, or None; makes the files."""
    unknown = [wanted for wanted in arguments.rows or () if not wanted or not any(cases([wanted], arguments.gpu))]
    if unknown:
        names = ", ".join(name for name, _ in cases(None, arguments.gpu))
        return f"--rows {' '.join(map(repr, unknown))} names no row: choose from {names}, or the start of some"
    if arguments.clock == "cpu" and (arguments.threads or torch.get_num_threads()) != 1:
        return "--clock cpu adds up the time of all threads: use it with --threads 1"
    if arguments.gpu and not (arguments.smoke or torch.cuda.is_available()):
        return "--gpu needs a GPU that torch can use; with --smoke it tries the rows without one"
    if arguments.model:
        try:
            require(arguments.model)
        except (OSError, ModuleNotFoundError) as error:
            return f"--model {arguments.model}: {error}"
    try:
        for name in report.FILES:
            (arguments.out / name).open("a").close()
    except OSError as error:
        return f"--out {arguments.out} cannot be written: {error}"
    return None


def cases(wanted: list[str] | None, on_a_gpu: bool = False) -> Iterator[tuple[str, Any]]:
    """The groups of rows with these starts of names, or all; a name may go into a group (`tie/fp32/…/memory`)."""
    for group in ON_A_GPU if on_a_gpu else GROUPS:
        for name, measure in group.cases():
            if wanted is None or any(name.startswith(w) or w.startswith(name + "/") for w in wanted):
                yield name, measure
