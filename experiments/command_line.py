"""The command line that repeats a run, for the files that the run writes."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Container


def repeated(
    command: str,
    add_arguments: Callable[[argparse.ArgumentParser], object],
    arguments: argparse.Namespace,
    without: Container[str] = ("workers",),
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
