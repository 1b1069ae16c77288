"""Argument checks that several modules share."""

import math
import operator
from collections.abc import Sequence
from typing import Any


def integer(value: object) -> int | None:
    """``value`` as a Python int if it is an integer of any library, but not a bool; else None."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def is_finite(value: object) -> bool:
    """Whether ``value`` is a number that a float can hold: not a bool, inf, nan or an integer of 400 digits."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}")


def names(name: str, value: Any) -> list[str]:
    """``value`` as a list of names.

    Raises:
        TypeError: it is not a sequence of strings.
    """
    if isinstance(value, str) or not isinstance(value, (Sequence, set, frozenset)):
        raise TypeError(f"{name}={value!r} must be a list of names")
    for item in value:
        if not isinstance(item, str):
            raise TypeError(f"{name}={value!r} must hold names, and {item!r} is not a string")
    return list(value)
