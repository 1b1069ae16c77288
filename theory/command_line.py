"""What the three commands share: help that names each default once, missing packages in words, and progress."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that adds "(default: …)" to options whose default is a value; other defaults are in the help's words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if not action.option_strings or isinstance(default, bool) or default in (None, argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: %(default)s)"


def require(*packages: str) -> None:
    """End the process with status 2 if a package is missing, and say what to install."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        print(f"error: {names} not installed: pip install {names}, or in the clone pip install -e '.[theory]'",
              file=sys.stderr)  # fmt: skip
        raise SystemExit(2)


def one_thread() -> None:
    """Keep BLAS to one thread unless the environment names a number; call it before NumPy is imported.

    The suite's matrices are small, and a second thread only costs time.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")
    if not any(name in os.environ for name in names):
        os.environ.update(dict.fromkeys(names, "1"))


def make_folder(out: Path) -> None:
    """Make the folder of a command's results, and write a file in it that is gone at once.

    Permissions are tried, not asked for: root has them all, also where nothing can be written.

    Raises:
        ValueError: the folder cannot be made or written; the message says why.
    """
    path = out.absolute()
    try:
        there = next(place for place in (path, *path.parents) if place.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file")
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"--out must be a folder to write, got {str(out)!r}: {error.strerror}") from error


def drawn(draw: Callable[[], Sequence[Path]]) -> str:
    """Draw, and return a line per picture; without matplotlib the line says so."""
    try:
        return "\n".join(f"picture: {path}" for path in draw())
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return "no picture: matplotlib is missing (pip install matplotlib)"


def progress(items: Sequence[Item], unit: str, name: Callable[[Item], str] = lambda item: "") -> Iterator[Item]:
    """The items, with tqdm's bar on a terminal, and elsewhere with a plain line for every tenth of them.

    Args:
        items: to go through.
        unit: of an item, in the singular.
        name: what is shown while an item is worked on.
    """
    if sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        with tqdm(items, unit=unit, file=sys.stderr) as bar:
            for item in bar:
                bar.set_description_str(name(item))
                yield item
        return
    started = time.perf_counter()
    for done, item in enumerate(items, start=1):
        yield item
        if 10 * done // len(items) > 10 * (done - 1) // len(items):
            print(f"{done:,} of {len(items):,} {unit}s, {time.perf_counter() - started:.0f} s", file=sys.stderr)
