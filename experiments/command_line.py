"""The command line: help that names each default once, checked numbers, and the command that repeats a run."""

from __future__ import annotations

import argparse
import errno
import itertools
import math
import shlex
import tempfile
from collections.abc import Callable, Container
from pathlib import Path

WHEREABOUTS = ("workers", "cluster", "cpus", "gpus", "memory", "offline")
"""The options of `add_whereabouts`; results do not depend on them."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that adds "(default: …)" to options whose default is a value; other defaults are in the help's words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if not action.option_strings or isinstance(default, bool) or default in (None, argparse.SUPPRESS, []):
            return action.help
        values = default if isinstance(default, (list, tuple)) else [default]
        shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        return f"{action.help} (default: {shown.replace('%', '%%')})"


def count(text: str) -> int:
    """The type of an option that takes a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of at least 1")
    return int(text)


def share(text: str) -> float:
    """The type of an option that takes GPUs: a fraction of one, or a whole number, which may be 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 <= value <= 1 or (value.is_integer() and value > 0)):
        raise argparse.ArgumentTypeError(f"{text}: give a fraction of a GPU, or a whole number of them")
    return value


def positive(text: str) -> float:
    """The type of an option that takes a positive number, such as a learning rate."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return value


def seed(text: str) -> int:
    """The type of an option that takes a seed, which NumPy and torch must both take: 0 to 2³² − 1."""
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 0 to {(1 << 32) - 1}")
    return int(text)


def add_seeds(parser: argparse.ArgumentParser, number: int) -> None:
    """The options that say which seeds are run; ``number`` of them by default."""
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="the first seed")
    parser.add_argument("--seeds", type=count, default=number, metavar="N", help="number of seeds")


def add_search_seeds(parser: argparse.ArgumentParser) -> None:
    """The option of a command that chooses learning rates."""
    parser.add_argument(
        "--search-seeds", type=count, default=1, metavar="N",
        help="how many of the seeds, from the first on, choose the rates",
    )  # fmt: skip


def seeds_of(arguments: argparse.Namespace) -> tuple[int, ...]:
    """The seeds that ``--seed`` and ``--seeds`` name."""
    return tuple(range(arguments.seed, arguments.seed + arguments.seeds))


def search_seeds(seeds: tuple[int, ...], number: int) -> tuple[int, ...]:
    """The first seeds, on which learning rates are chosen.

    Args:
        seeds: of the comparison.
        number: of ``--search-seeds``.

    Raises:
        ValueError: there are fewer seeds.
    """
    if number > len(seeds):
        raise ValueError(f"--search-seeds {number} exceeds the number of seeds, {len(seeds)} (--seeds)")
    return seeds[:number]


def add_whereabouts(parser: argparse.ArgumentParser) -> None:
    """The options of every sweep: where its runs happen, and whether a hub may be asked."""
    parser.add_argument(
        "--workers", type=count, metavar="N",
        help="runs at a time (default: one per core, or per GPU; on a cluster, as many as it has room for)",
    )  # fmt: skip
    parser.add_argument(
        "--cluster", metavar="ADDRESS", help="run on a Ray cluster: auto for the one of this machine, or HOST:PORT"
    )
    parser.add_argument("--cpus", type=count, metavar="N", help="a run's cores on the cluster (default: 1)")
    parser.add_argument("--gpus", type=share, metavar="N",
                        help="a run's GPUs there, such as 0.5 (default: 1 if a node has one)")  # fmt: skip
    parser.add_argument("--memory", type=positive, metavar="GB", help="a run's memory there (default: not counted)")
    add_offline(parser)


def add_offline(parser: argparse.ArgumentParser) -> None:
    """The option of every command that may ask a hub for a model or for data."""
    parser.add_argument("--offline", action="store_true", help="never ask the hub: folders and cached copies only")


def make_folder(folder: Path) -> list[Path]:
    """Make the folder of a command's results, and write a file in it that is gone at once.

    Permissions are tried, not asked for: root has them all, also where nothing can be written.

    Returns:
        The folders that did not exist, the innermost first.

    Raises:
        OSError: the folder cannot be made or written; the message says why.
    """
    path = folder.absolute()
    try:
        missing = list(itertools.takewhile(lambda place: not place.exists(), (path, *path.parents)))
        there = missing[-1].parent if missing else path
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file")
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"{error.strerror}; give another folder") from error
    return missing


def repeated(
    command: str,
    add_arguments: Callable[[argparse.ArgumentParser], object],
    arguments: argparse.Namespace,
    without: Container[str] = WHEREABOUTS,
) -> str:
    """The command with the options that are not at their default.

    Args:
        command: such as ``demo`` or ``table 1``.
        add_arguments: adds the options to a parser.
        arguments: parsed.
        without: options that do not change the results.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parts = ["python -m experiments", command]
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(arguments, name)
        if value == default or name in without:
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parts.append(option if value else f"--no-{option[2:]}")
        else:
            parts += [option, *(shlex.quote(str(v)) for v in (value if isinstance(value, list) else [value]))]
    return " ".join(parts)
