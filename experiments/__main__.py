"""`python -m experiments COMMAND`: one subcommand per experiment, each with its own `--help`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress

from experiments import hub
from experiments.command_line import Help, make_folder
from experiments.report.noise import without_noise

COMMANDS = {
    "demo": ("frontier.demo", "show on real text, offline, that a chain beats a LoRA of its bytes"),
    "run": ("paper.run", "run one cell of the paper's experiments: a model, a task, a method, a learning rate, a seed"),
    "pretrain": ("tiny.pretrain", "make the tiny models that the demo and the study fine-tune"),
    "study": (
        "study.study",
        "compare methods, ranks and base optimizers on a small model and text, with tuned rates and five seeds",
    ),
    "frontier": (
        "frontier.frontier",
        "draw held-out loss against bytes of trained state, a curve per method over ranks",
    ),
    "map": ("frontier.pay_map", "show for every rank and length of run which method is best, and by how much"),
    "table": ("paper.reproduce", "reproduce one of the paper's eight tables, or make one of our own"),
    "figure": ("paper.figures", "reproduce the paper's figure 2 or 3"),
    "bench": ("bench", "time layer, step, tie, knot and export against their peers and limits"),
    "gpu": ("gpu", "run on a GPU, in minutes, what needs one: its tests, the benchmark's rows, a cell of Table 1"),
    "rounding": ("study.rounding", "measure the cost of each rounding of a tie in a half-precision run"),
}
"""Name -> (module, one line of help). Every module has `add_arguments(parser)` and `main(arguments)`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        Its exit status; 2 for a wrong argument or none, or if a library is missing, 130 if it was interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m experiments", description=(__doc__ or "").splitlines()[0])
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module_name, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=Help,
            allow_abbrev=False,  # --seed would be taken for --seeds
        )
        # import only the command that runs
        if name in argv[:1]:
            without_noise()
            try:
                module = importlib.import_module(f"experiments.{module_name}")
            except ModuleNotFoundError as error:
                return _not_installed(name, error)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.main)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stopped:  # help, or a wrong argument that argparse has named
        return int(stopped.code or 0)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        made = make_folder(arguments.out)
    except OSError as error:
        print(f"{arguments.command}: --out {arguments.out} cannot be written: {error}", file=sys.stderr)
        return 2
    if getattr(arguments, "offline", False):
        hub.go_offline()
    try:
        status = int(arguments.run(arguments))
    except ModuleNotFoundError as error:
        status = _not_installed(arguments.command, error)
    except KeyboardInterrupt:
        print(f"\n{arguments.command}: interrupted", file=sys.stderr)
        status = 130
    for folder in made if status == 2 else ():
        with suppress(OSError):  # it is not empty, or another process has removed it
            folder.rmdir()
    return status


def _not_installed(command: str, error: ModuleNotFoundError) -> int:
    package = (error.name or "").partition(".")[0]
    if package in ("", "cola", "theory", "experiments"):
        raise error
    print(
        f"{command}: {package} is not installed: pip install {package}, or from the checkout "
        "pip install -e '.[experiments]' (for bench '.[experiments,peft]', for --cluster '.[experiments,cluster]')",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
