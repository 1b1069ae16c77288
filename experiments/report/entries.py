"""What a table of scores is made of: columns, rows, cells with a value per seed, and comparisons of cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from experiments.report import stats

LEVEL = 0.05
"""The level of significance, after Holm's correction over all comparisons of a table."""


@dataclass(frozen=True)
class Column:
    """What a column holds.

    Attributes:
        key: its name in files, such as `wsc`.
        label: as shown.
        form: how a number is written.
        higher_is_better: False where lower is, None for what is neither (a cost): it is not compared.
    """

    key: str
    label: str
    form: str = ".2f"
    higher_is_better: bool | None = True

    def show(self, value: float) -> str:
        """A number of this column."""
        return format(value, self.form)


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        key: its name in files.
        label: as shown.
        reference: key of the row it is compared with, seed by seed; None for none.
        group: rows of one group stand together.
        short: as a figure shows it; empty for the label.
    """

    key: str
    label: str
    reference: str | None = None
    group: str = ""
    short: str = ""


@dataclass(frozen=True)
class Entry:
    """One cell of a table.

    Attributes:
        values: seed -> our number; seeds that have not been run are absent, runs that diverged are not finite.
        paper: the paper's mean; None where it prints none.
        paper_std: the paper's standard deviation; None where it prints none.
        note: what else is known of it, such as the learning rate chosen.
    """

    values: Mapping[int, float] = field(default_factory=dict)
    paper: float | None = None
    paper_std: float | None = None
    note: str = ""

    @cached_property
    def finite(self) -> dict[int, float]:
        """The values of runs that did not diverge, by rising seed."""
        return {seed: value for seed, value in sorted(self.values.items()) if math.isfinite(value)}

    @property
    def mean(self) -> float | None:
        """Of the finite values; None without any."""
        return math.fsum(self.finite.values()) / len(self.finite) if self.finite else None

    @property
    def std(self) -> float | None:
        """The standard deviation of a sample (n − 1); None for fewer than two values."""
        return statistics.stdev(self.finite.values()) if len(self.finite) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """A cell minus its row's reference in the same column, paired by seed."""

    row: Row
    column: Column
    seeds: tuple[int, ...]
    found: stats.Paired

    @property
    def verdict(self) -> str:
        """`better` or `worse` if significant at `LEVEL` after Holm's correction, else `no evidence`.

        `no test` for a single seed, or for a difference that is the same for every seed.
        """
        if math.isnan(self.found.p):
            return "no test"
        if not self.found.significant(LEVEL):
            return "no evidence"
        return "better" if (self.found.difference.mean > 0) == bool(self.column.higher_is_better) else "worse"
