"""What COLA costs, beside its peers and beside what arithmetic and bandwidth allow, in one run.

    python -m experiments bench
    python -m experiments bench --rows layer/fp32 tie knot

Contenders run interleaved, in a random order within each round, on the same number of threads; a row is the ratio
within rounds: its median, and its 10 % and 90 % points. Rows: layer, step, overhead, tie, compiled, knot, chain,
export, import, scaling. The exit status is 1 if a result is wrong (ours and a peer's differ) or, with --strict, if a
target is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from experiments import tiny_opt
from experiments.bench import compiled, export, knot, layer, report, scaling, step, tie
from experiments.bench.measure import CLOCKS, Row, Settings

GROUPS = (layer, step, tie, compiled, knot, export, scaling)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m experiments bench`."""
    parser.epilog = __doc__
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data and of the order of runs (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="rows to measure, by the start of their names")
    parser.add_argument("--seconds", type=float, default=3.0, help="per comparison (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: process time, for one thread on a machine with other work"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed, too")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs; figures mean nothing")


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m experiments bench`; 1 if a result is wrong."""
    tiny_opt.quiet()
    chosen = dict(cases(arguments.rows))
    if not chosen:
        names = ", ".join(name for name, _ in cases(None))
        print(f"--rows {' '.join(arguments.rows)} names no row: choose from {names}", file=sys.stderr)
        return 2
    if arguments.clock == "cpu" and (arguments.threads or torch.get_num_threads()) != 1:
        print("--clock cpu adds up the time of all threads: use it with --threads 1", file=sys.stderr)
        return 2
    settings = Settings(arguments.seed, arguments.seconds, arguments.smoke, arguments.clock)
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or before)
    started = time.perf_counter()
    rows: list[Row] = []
    try:
        for name, measure in (bar := tqdm(chosen.items(), unit="group")):
            bar.set_description(name)
            rows += measure(settings)
    finally:
        torch.set_num_threads(before)
    minutes = (time.perf_counter() - started) / 60
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(report.write(rows, settings, arguments, minutes))
    wrong = [row.name for row in rows if row.right is False]
    missed = [row.name for row in rows if row.reached is False]
    if wrong:
        print(f"wrong results: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong) or (arguments.strict and bool(missed)))


def cases(wanted: list[str] | None) -> Iterator[tuple[str, Any]]:
    """The groups of rows whose names start as wanted, or all; a name may go on into a group (`tie/fp32/…/memory`)."""
    for group in GROUPS:
        for name, measure in group.cases():
            if wanted is None or any(name.startswith(w) or w.startswith(name + "/") for w in wanted):
                yield name, measure
