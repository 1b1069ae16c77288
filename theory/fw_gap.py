"""Check Theorem 4.1 of Chain of LoRA so hard that it could fail: ``python -m theory.fw_gap``.

Without options the command runs the standard suite in about a minute, prints one table, and writes
``results.jsonl`` and pictures to ``--out``. With ``--instance``, ``--step``, ``--oracle``, ``--T``,
``--epsilon``, ``--rho`` or ``--batch`` it makes the named runs only. The exit status is 1 if any check FAILs and
2 for a bad argument.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from theory.command_line import Help, drawn, make_folder, one_thread, progress, require

if __name__ == "__main__":
    one_thread()
    require("numpy", "scipy")  # before the modules that import them

from theory.checks import FAIL, PASS, VACUOUS, Check, noise, significance
from theory.checks.record import STRUCTURAL
from theory.gradient_estimators import Minibatch
from theory.problems.instances import INSTANCES, TIGHT
from theory.seeds import run_seeds
from theory.step_sizes import STEPS, Step
from theory.suite import plots, sensitivity, tasks
from theory.suite.tasks import Record, Task

ORACLES = ("own", "lanczos", "additive", "multiplicative")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m theory.fw_gap",
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        epilog="The exit status is 0 if no check fails, 1 if one does, 2 for a bad argument.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    out.add_argument(
        "--instance", nargs="+", metavar="NAME", help="instances to run; see --list (default: the standard suite)"
    )
    out.add_argument("--step", nargs="+", metavar="RULE", help=f"step rules: {', '.join(STEPS)} (default: theorem)")
    out.add_argument(
        "--oracle", choices=ORACLES, help="the set's own, by Lanczos, or erring by --epsilon or --rho (default: own)"
    )
    out.add_argument(
        "--T", nargs="+", type=int, metavar="T", help="horizons, each a separate run (default: the instance's)"
    )
    out.add_argument("--seeds", type=int, metavar="N", help="runs per rung of a ladder (default: 8)")
    out.add_argument("--seed", type=int, default=0, metavar="N", help="any whole number, each with draws of its own")
    out.add_argument("--epsilon", nargs="+", type=float, metavar="EPS", help="additive errors of the oracle")
    out.add_argument("--rho", nargs="+", type=float, metavar="RHO", help="fractions of the gap that the oracle keeps")
    out.add_argument(
        "--batch", nargs="+", type=int, metavar="B", help="batch sizes of the gradient (default: the exact gradient)"
    )
    out.add_argument(
        "--sigma", type=float, metavar="S", help="noise for --batch where a problem draws no batches (default: 2)"
    )
    out.add_argument("--out", type=Path, default=Path("runs/fw_gap"), metavar="DIR", help="results and pictures")
    out.add_argument(
        "--sensitivity",
        action="store_true",
        help="show how far each constant of the named instances may be off before a check fails, and stop",
    )
    out.add_argument("--list", action="store_true", help="list instances and step rules, and stop")
    out.add_argument("--no-plots", action="store_true", help="write no pictures (matplotlib is then not needed)")
    return out


def listing() -> str:
    """The output of ``--list``."""
    width = max(map(len, INSTANCES))
    lines, near = [], TIGHT[:-1]
    for title, names in (
        ("tight instances [standard horizons]: the average gap is close to the bound", near),
        ("loose instances: they guard the code rather than the constants", [n for n in INSTANCES if n not in near]),
    ):
        lines.append(title)
        for name in names:
            instance = INSTANCES[name]
            lines.append(f"  {name:{width}}  {instance.about} [{', '.join(map(str, instance.horizons))}]")
    lines += ["step rules:", "  " + ", ".join(STEPS), "oracles:", "  " + ", ".join(ORACLES)]
    return "\n".join(lines)


def chosen(options: argparse.Namespace) -> list[Task]:
    """The tasks that the options name, or the standard suite.

    Raises:
        ValueError: an option names something unknown, or has no effect.
    """
    if options.seeds is not None and options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {options.seeds}: give the number of runs per rung")
    custom = ("instance", "step", "oracle", "T", "epsilon", "rho", "batch", "sigma")
    if all(getattr(options, name) is None for name in custom):
        return list(tasks.standard(_seeds(options), options.seed))
    for name in options.instance or []:
        if name not in INSTANCES:
            raise ValueError(f"--instance {name!r} is not known: choose from {', '.join(INSTANCES)}")
    for name in options.step or []:
        if name not in STEPS:
            raise ValueError(f"--step {name!r} is not known: choose from {', '.join(STEPS)}")
    for T in options.T or []:
        if T < 1:
            raise ValueError(f"--T must be at least 1, got {T}: give the number of steps")
    return list(grid(options))


def _seeds(options: argparse.Namespace) -> int:
    return 8 if options.seeds is None else options.seeds


def _consistent(options: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    if options.epsilon is not None and options.rho is not None:
        raise ValueError("--epsilon and --rho name different oracles: give one of them")
    for flag, kind in (("epsilon", "additive"), ("rho", "multiplicative")):
        if getattr(options, flag) is not None and options.oracle not in (None, kind):
            raise ValueError(f"--{flag} has no effect on --oracle {options.oracle}: leave one of them out")
    if options.sigma is not None and options.batch is None:
        raise ValueError("--sigma has no effect without --batch: give batch sizes, or leave it out")
    if options.seeds is not None and options.batch is None:
        raise ValueError("--seeds has no effect on named runs without --batch: leave it out")


def grid(options: argparse.Namespace) -> Iterator[Task]:
    """One task for each instance, step rule and setting."""
    _consistent(options)
    kind = options.oracle or ("additive" if options.epsilon else "multiplicative" if options.rho else "own")
    if kind == "additive" and not options.epsilon:
        raise ValueError("--oracle additive needs --epsilon: give one or several additive errors")
    if kind == "multiplicative" and not options.rho:
        raise ValueError("--oracle multiplicative needs --rho: give one or several fractions in (0, 1]")
    errors = [(e, 1.0) for e in options.epsilon or []] if kind == "additive" else [(0.0, 1.0)]
    if kind == "multiplicative":
        errors = [(0.0, rho) for rho in options.rho]
    count = _seeds(options) if options.batch else 1
    names, rules, sizes = options.instance or TIGHT, options.step or ["theorem"], options.batch or [None]
    horizons_of = {name: options.T or INSTANCES[name].horizons for name in names}
    runs = sum(map(len, horizons_of.values())) * len(rules) * len(errors) * len(sizes) * count
    level = significance.share(noise.STATISTICAL * runs)
    for name in names:
        for rule, (epsilon, rho), batch in itertools.product(rules, errors, sizes):
            shown = {
                f" {rule}": rule != "theorem",
                " lanczos": kind == "lanczos",
                f" eps={epsilon:g}": kind == "additive",
                f" rho={rho:g}": kind == "multiplicative",
                f" b={batch}": batch is not None,
            }
            tag = "".join(part for part, told in shown.items() if told)
            oracle = tasks.oracle_maker(kind, epsilon, rho)
            gradient = None if batch is None else Minibatch(batch)
            cell = partial(
                tasks.single, name, oracle=oracle, gradient=gradient, sigma=options.sigma, tag=tag, level=level
            )
            rated = name if not tag else None
            draws = {T: _draws(options, name + tag, T) for T in horizons_of[name]}
            yield Task(name + tag, partial(_cell, cell, rated, STEPS[rule], draws))


def _draws(options: argparse.Namespace, label: str, T: int) -> list[int]:
    """The seeds of the runs of one setting: the command's own where nothing but data is drawn, else new ones."""
    return run_seeds(options.seed, _seeds(options), label, f"{T}") if options.batch else [options.seed]


def _cell(run: Callable[..., Record], rated: str | None, step: Step, draws: dict[int, list[int]]) -> list[Record]:
    """The records of one setting, with the rate of the plain algorithm on a near-tight instance.

    Args:
        run: one run. rated: the instance's name, or None. step: rule. draws: horizon -> seeds.
    """
    out = [run(T=T, step=step, seed=seed) for T, seeds in draws.items() for seed in seeds]
    if rated in TIGHT and len(draws) >= 4:
        out.append(tasks.rate_record(rated, out))
    return out


def _prominence(check: Check) -> tuple[int, float]:
    """A sort key: failures, then bounds that say something, then the rest; each by margin."""
    if check.verdict == FAIL:
        rank = 0
    elif check.name in STRUCTURAL:
        rank = 3
    else:
        rank = 1 if check.verdict == PASS else 2
    return rank, check.margin


def table(records: Sequence[Record]) -> str:
    """One row per record: ratios to ``s``, the tightest margin, and the numbers of verdicts."""
    width = max(24, *(len(record.label) for record in records))
    seeds = [f"{record.seeds[0]}" if len(record.seeds) == 1 else f"{len(record.seeds)} runs" for record in records]
    seed_width = max(6, *map(len, seeds))
    head = (
        f"{'instance':{width}} {'seed':>{seed_width}} {'T':>6} {'avg gap':>10} {'avg/s':>7} {'min/s':>7}"
        f"  {'tightest bound (slack left)':<42}"
        f" {'P/F/V':>9}  verdict"
    )
    lines = [head, "-" * len(head)]
    for r, seed in zip(records, seeds):
        nearest = min(r.checks, key=_prominence)
        tight = f"{nearest.name[:32]} ({nearest.margin:+.1%})"
        counts = f"{r.count(PASS)}/{r.count(FAIL)}/{r.count(VACUOUS)}"
        lines.append(
            f"{r.label:{width}} {seed:>{seed_width}} {r.T:>6} {r.average:>10.4g}"
            f" {r.average / r.scale:>7.3f} {r.smallest / r.scale:>7.3f}"
            f"  {tight:<42} {counts:>9}  {r.verdict}"
        )
    return "\n".join(lines)


def _sensitivity(options: argparse.Namespace) -> int:
    """Print the table of `theory.suite.sensitivity` for the named instances, by default all but the quadratics."""
    names = options.instance or list(sensitivity.HORIZONS)
    unknown = [name for name in names if name not in sensitivity.HORIZONS]
    if unknown:
        known = ", ".join(sensitivity.HORIZONS)
        print(f"error: --sensitivity has no instance {unknown[0]!r}: choose from {known}", file=sys.stderr)
        return 2
    rows = [sensitivity.row(name) for name in progress(names, "instance", str)]
    print("\n".join([sensitivity.HEAD, *rows]))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    options = command.parse_args(arguments)
    if options.list:
        print(listing())
        return 0
    if options.sensitivity:
        return _sensitivity(options)
    started = time.perf_counter()
    records: list[Record] = []
    try:
        tasks = chosen(options)
        make_folder(options.out)
        with (options.out / "results.jsonl").open("w", encoding="utf-8") as lines:
            for task in progress(tasks, "task", lambda task: task.name):
                for record in task.run():
                    records.append(record)
                    lines.write(record.as_json() + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(records))
    failed = [(r, c) for r in records for c in r.checks if c.verdict == FAIL]
    for record, check in failed:
        sides = f"{check.measured:.6g} against {check.bound:.6g}"
        detail = f"; {check.detail}" if check.detail else ""
        print(f"FAIL {record.label} (T = {record.T}): {check.name}: {sides}{detail}")
    counts = {v: sum(r.count(v) for r in records) for v in (PASS, FAIL, VACUOUS)}
    print(f"\n{len(records)} rows, checks: " + ", ".join(f"{n} {v}" for v, n in counts.items()))
    levels = [c.level for r in records for c in r.checks if c.level]
    if levels:
        chance = f"one run in {1 / sum(levels):,.0f} at most (the family's level: {significance.FAMILY:g})"
        print(f"{len(levels)} of them are statistical: a false alarm among them in {chance}")
    print(f"results: {options.out / 'results.jsonl'}")
    if not options.no_plots:
        print(drawn(lambda: plots.pictures(records, options.out)))
    print(f"{time.perf_counter() - started:.1f} s")
    return 1 if failed else 0


def _entry() -> int:
    """`main`, but quiet if the reader of the output closes the pipe, like ``head``."""
    try:
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # at exit the interpreter flushes standard output again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(_entry())
