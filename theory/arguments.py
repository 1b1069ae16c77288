"""Argument checks. Every message names the argument, shows its value and asks for a better one."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def positive(name: str, value: Any, meaning: str) -> float:
    """Return ``value`` as a float if it is a finite number above zero, else raise ``ValueError``."""
    if not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}: give {meaning}")
    return float(value)


def nonnegative(name: str, value: Any, meaning: str) -> float:
    """Return ``value`` as a float if it is a finite number of at least zero, else raise ``ValueError``."""
    if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}: give {meaning}")
    return float(value)


def fraction(name: str, value: Any, meaning: str) -> float:
    """Return ``value`` as a float if it lies in (0, 1], else raise ``ValueError``."""
    if not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}: give {meaning}")
    return float(value)


def count(name: str, value: Any, meaning: str, least: int = 1) -> int:
    """Return ``value`` as an int if it is a whole number of at least ``least``, else raise ``ValueError``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}: give {meaning}")
    return int(value)


def matrix_shape(name: str, value: Any) -> tuple[int, int]:
    """Return ``value`` as ``(rows, columns)`` if it is a pair of positive whole numbers, else raise."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"{name} must be a pair (rows, columns), got {value!r}: give the shape of W")
    return count(f"{name}[0]", value[0], "the number of rows"), count(f"{name}[1]", value[1], "the number of columns")
