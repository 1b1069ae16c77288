"""A table of scores over seeds next to the paper's: means, deviations, paired comparisons, in several formats.

Missing scores are shown as "–" and named below the table; nothing is filled in.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.files import write_atomically
from experiments.report import formats, stats
from experiments.report.formats import Grid, Text
from experiments.report.stats import LEVEL

MISSING = "–"
_NO_SPREAD = 1e-9  # of scores in percent; rounding alone gives about 1e-13
_TERMINAL = 120  # characters: a wider matrix is shown with a line per column if that is narrower


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: its name in files, such as `wsc`.
        label: as shown.
        form: the format of a number.
        higher_is_better: False where lower is better; None for a cost, which is not compared.
    """

    key: str
    label: str
    form: str = ".2f"
    higher_is_better: bool | None = True

    def show(self, value: float) -> str:
        """A number in this column's format."""
        return format(value, self.form)


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        key: its name in files.
        label: as shown.
        reference: key of the row it is compared with, seed by seed; None for none.
        group: rows of a group are shown together.
        short: the label in a figure; empty for the same label.
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
        values: seed -> our number, without seeds that have not been run; not finite for runs that diverged.
        paper: the paper's mean; None where it prints none.
        paper_std: the paper's standard deviation; None where it prints none.
        note: a remark, such as the chosen learning rate.
    """

    values: Mapping[int, float] = field(default_factory=dict)
    paper: float | None = None
    paper_std: float | None = None
    note: str = ""

    @cached_property
    def finite(self) -> dict[int, float]:
        """The values of runs that did not diverge, in the order of the seeds."""
        return {seed: value for seed, value in sorted(self.values.items()) if math.isfinite(value)}

    @property
    def mean(self) -> float | None:
        """The mean of the finite values; None without any."""
        return math.fsum(self.finite.values()) / len(self.finite) if self.finite else None

    @property
    def std(self) -> float | None:
        """The sample standard deviation (n − 1); None for fewer than two values."""
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

        `no test` for a single seed, or if all seeds have the same difference.
        """
        if math.isnan(self.found.p):
            return "no test"
        if not self.found.significant(LEVEL):
            return "no evidence"
        return "better" if (self.found.difference.mean > 0) == bool(self.column.higher_is_better) else "worse"


@dataclass(frozen=True)
class Table:
    """Scores of rows (methods) in columns (tasks).

    Attributes:
        title: of the table.
        columns: in order.
        rows: in order.
        entries: (row key, column key) -> cell; a place without an experiment has no entry and stays empty.
        seeds: of every entry.
        notes: sentences below the table.

    Raises:
        ValueError: an entry or a reference names no row or column, or a key occurs twice.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    entries: Mapping[tuple[str, str], Entry]
    seeds: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rows, columns = [row.key for row in self.rows], [column.key for column in self.columns]
        for name, keys in (("rows", rows), ("columns", columns)):
            if len(set(keys)) < len(keys):
                raise ValueError(f"{name}={keys}: a key occurs twice")
        for place in self.entries:
            if place[0] not in rows or place[1] not in columns:
                raise ValueError(f"entries[{place}]: the rows are {rows}, the columns {columns}")
        for row in self.rows:
            if row.reference is not None and row.reference not in rows:
                raise ValueError(f"rows: {row.key!r} refers to {row.reference!r}, which is not among {rows}")

    def missing(self) -> list[str]:
        """One phrase for every cell that lacks seeds or has a run that diverged."""
        found = []
        for row, column, entry in self._cells():
            absent = [seed for seed in self.seeds if seed not in entry.values]
            diverged = [seed for seed, value in sorted(entry.values.items()) if not math.isfinite(value)]
            where = f"{row.label}, {column.label}"
            if absent:
                found.append(f"{where}: seed{_s(absent)} {_list(absent)} missing")
            if diverged:
                found.append(f"{where}: seed{_s(diverged)} {_list(diverged)} diverged")
        return found

    def comparisons(self) -> list[Comparison]:
        """Every cell against its reference, over the seeds that both have; Holm's correction covers all of them."""
        pairs = []
        for row, column, entry in self._cells():
            base = self.entries.get((row.reference or "", column.key))
            if base is None or column.higher_is_better is None:
                continue
            seeds = tuple(seed for seed in entry.finite if seed in base.finite)
            if seeds:
                pairs.append(
                    (row, column, seeds, _compare([entry.finite[s] for s in seeds], [base.finite[s] for s in seeds]))
                )
        adjusted = stats.holm([pair[-1].p for pair in pairs])
        return [
            Comparison(row, column, seeds, stats.Paired(found.difference, found.p, p))
            for (row, column, seeds, found), p in zip(pairs, adjusted)
        ]

    def matrix(self) -> Grid:
        """A line of ours per row (mean ± standard deviation), with the paper's below it if there is one.

        The best mean of a column within a group is bold, unless all are equal.
        """
        best = self._best()
        lines: list[tuple[Text, ...]] = []
        groups: list[int] = []
        last = None
        for row in self.rows:
            if row.group != last:
                groups.append(len(lines))
                last = row.group
            cells = [self.entries.get((row.key, column.key)) for column in self.columns]
            ours = [self._ours(entry, column) for entry, column in zip(cells, self.columns)]
            bold = [(row.key, column.key) in best for column in self.columns]
            lines.append((Text(row.label), *map(Text, ours, bold)))
            if any(entry is not None and entry.paper is not None for entry in cells):
                lines.append((Text("  paper"), *(Text(_paper(e, c)) for e, c in zip(cells, self.columns))))
        return Grid(("", *(column.label for column in self.columns)), tuple(lines), groups=tuple(groups))

    def by_column(self) -> Grid:
        """The same numbers with a line per column, for many tasks on a narrow terminal."""
        papers = [
            row for row in self.rows if any(self._entry(row, column).paper is not None for column in self.columns)
        ]
        header = [""]
        lines: list[tuple[Text, ...]] = []
        for row in self.rows:
            header += [row.label, "paper"] if row in papers else [row.label]
        for column in self.columns:
            line = [Text(column.label)]
            for row in self.rows:
                entry = self.entries.get((row.key, column.key))
                line.append(Text(self._ours(entry, column)))
                if row in papers:
                    line.append(Text(_paper(entry, column)))
            lines.append(tuple(line))
        return Grid(tuple(header), tuple(lines))

    def differences(self) -> Grid:
        """A line per comparison: the paired difference, its 95 % interval, p plain and corrected, the paper's."""
        labels = {row.key: row.label for row in self.rows}
        lines: list[tuple[Text, ...]] = []
        groups: list[int] = []
        last = None
        for found in self.comparisons():
            if found.column.key != last:
                groups.append(len(lines))
                last = found.column.key
            form = "+" + found.column.form
            limits, p = found.found.difference, (found.found.p, found.found.p_holm)
            interval = MISSING if math.isnan(limits.low) else f"{limits.low:{form}} to {limits.high:{form}}"
            paper = self._paper_difference(found)
            lines.append(
                (
                    Text(found.column.label),
                    Text(f"{found.row.label} minus {labels[found.row.reference or '']}"),
                    Text(f"{limits.mean:{form}}"),
                    Text(interval),
                    *(Text(MISSING if math.isnan(value) else f"{value:.2g}") for value in p),
                    Text(str(len(found.seeds))),
                    Text(MISSING if paper is None else f"{paper:{form}}"),
                    Text(found.verdict),
                )
            )
        header = ("", "", "difference", "95 % interval", "p", "p (Holm)", "seeds", "paper's", "")
        return Grid(header, tuple(lines), left=2, groups=tuple(groups))

    def records(self) -> list[dict[str, Any]]:
        """One dictionary per cell, in full precision; unknown values are None."""
        compared = {(found.row.key, found.column.key): found for found in self.comparisons()}
        return [
            {
                "row": row.key,
                "row_label": row.label,
                "group": row.group or None,
                "column": column.key,
                "column_label": column.label,
                "mean": entry.mean,
                "std": entry.std,
                "n": len(entry.finite),
                "wanted": len(self.seeds),
                "paper": entry.paper,
                "paper_std": entry.paper_std,
                "minus_paper": None if entry.mean is None or entry.paper is None else entry.mean - entry.paper,
                "note": entry.note or None,
                **_comparison(row, compared.get((row.key, column.key))),
                "values": {str(seed): _number(value) for seed, value in sorted(entry.values.items())},
            }
            for row, column, entry in self._cells()
        ]

    def text(self) -> str:
        """For a terminal."""
        shown = formats.aligned(self.matrix())
        if max(map(len, shown.splitlines())) > _TERMINAL:
            shown = min(shown, formats.aligned(self.by_column()), key=lambda text: max(map(len, text.splitlines())))
        parts = [self.title, shown]
        if self.comparisons():
            parts.append(f"{_ABOUT}\n{formats.aligned(self.differences())}")
        return "\n\n".join([*parts, *self._below()])

    def markdown(self) -> str:
        """The same in Markdown."""
        parts = [f"**{formats.escape_markdown(self.title)}**", formats.markdown(self.matrix())]
        if self.comparisons():
            parts += [_ABOUT, formats.markdown(self.differences())]
        return "\n\n".join([*parts, *map(formats.escape_markdown, self._below())]) + "\n"

    def latex(self, label: str = "") -> str:
        """The matrix, then the comparisons, each a `table` with booktabs' rules."""
        parts = [formats.latex(self.matrix(), " ".join([self.title + ".", *self._below()]), label)]
        if self.comparisons():
            parts.append(formats.latex(self.differences(), f"{self.title}. {_ABOUT}", label and f"{label}-paired"))
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """`records`, a line per cell, with a column per seed."""
        seeds = sorted({seed for entry in self.entries.values() for seed in entry.values} | set(self.seeds))
        rows = [
            {
                **{k: v for k, v in record.items() if k != "values"},
                **{f"seed_{seed}": record["values"].get(str(seed)) for seed in seeds},
            }
            for record in self.records()
        ]
        return formats.csv_text(rows, [*_FIELDS, *(f"seed_{seed}" for seed in seeds)])

    def json(self, **about: Any) -> str:
        """`records` with the missing runs, the notes, and everything in `about`."""
        written = {
            **about,
            "title": self.title,
            "seeds": list(self.seeds),
            "level": LEVEL,
            "missing": self.missing(),
            "notes": list(self.notes),
            "cells": self.records(),
        }
        return json.dumps(written, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, stem: Path, **about: Any) -> list[Path]:
        """Write stem.txt, .md, .csv, .tex and .json, and return their paths; `about` goes into the JSON."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        texts = {
            ".txt": self.text() + "\n",
            ".md": self.markdown(),
            ".csv": self.csv(),
            ".tex": self.latex(f"tab:{stem.name}"),
            ".json": self.json(**about),
        }
        paths = []
        for suffix, text in texts.items():
            path = stem.with_name(stem.name + suffix)
            write_atomically(path, text)
            paths.append(path)
        return paths

    def _cells(self) -> Iterator[tuple[Row, Column, Entry]]:
        for column in self.columns:
            for row in self.rows:
                entry = self.entries.get((row.key, column.key))
                if entry is not None:
                    yield row, column, entry

    def _entry(self, row: Row, column: Column) -> Entry:
        return self.entries.get((row.key, column.key), Entry())

    def _ours(self, entry: Entry | None, column: Column) -> str:
        if entry is None:
            return ""
        if entry.mean is None:
            return MISSING
        spread = "" if entry.std is None or column.higher_is_better is None else f" ± {column.show(entry.std)}"
        short = f" ({len(entry.finite)}/{len(self.seeds)})" if len(entry.finite) < len(self.seeds) else ""
        return column.show(entry.mean) + spread + short

    def _best(self) -> set[tuple[str, str]]:
        best = set()
        for column in self.columns:
            for group in dict.fromkeys(row.group for row in self.rows):
                means = {
                    row.key: mean
                    for row in self.rows
                    if row.group == group and (mean := self._entry(row, column).mean) is not None
                }
                if column.higher_is_better is not None and len(set(means.values())) > 1:
                    top = max(means.values()) if column.higher_is_better else min(means.values())
                    best |= {(row, column.key) for row, mean in means.items() if mean == top}
        return best

    def _paper_difference(self, found: Comparison) -> float | None:
        this = self.entries[found.row.key, found.column.key].paper
        base = self.entries[found.row.reference or "", found.column.key].paper
        return None if this is None or base is None else this - base

    def _below(self) -> list[str]:
        missing = self.missing()
        said = [f"Not complete ({MISSING}, or fewer seeds in brackets): {'; '.join(missing)}."] if missing else []
        return [*self.notes, *said]


_ABOUT = "Paired by seed; two-sided t test, 95 % t interval, p also after Holm's correction over all lines."
_FIELDS = (
    "row", "row_label", "group", "column", "column_label", "mean", "std", "n", "wanted", "paper", "paper_std",
    "minus_paper", "note", "reference", "difference", "low", "high", "p", "p_holm", "verdict",
)  # fmt: skip


def _comparison(row: Row, found: Comparison | None) -> dict[str, Any]:
    if found is None:
        return dict.fromkeys(("difference", "low", "high", "p", "p_holm", "verdict")) | {"reference": row.reference}
    limits = found.found.difference
    return {
        "reference": row.reference,
        "difference": limits.mean,
        "low": _number(limits.low),
        "high": _number(limits.high),
        "p": _number(found.found.p),
        "p_holm": _number(found.found.p_holm),
        "verdict": found.verdict,
    }


def _compare(values: list[float], base: list[float]) -> stats.Paired:
    """Compare in pairs, without p if all differences are equal: t is then undefined."""
    differences = [value - other for value, other in zip(values, base)]
    if max(differences) - min(differences) <= _NO_SPREAD:
        return stats.Paired(stats.t_interval(differences), math.nan, math.nan)
    return stats.paired({"this": values, "reference": base}, "reference")["this"]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _paper(entry: Entry | None, column: Column) -> str:
    if entry is None or entry.paper is None:
        return "" if entry is None else MISSING
    return column.show(entry.paper) + ("" if entry.paper_std is None else f" ± {column.show(entry.paper_std)}")


def _s(items: list[int]) -> str:
    return "s" if len(items) > 1 else ""


def _list(items: list[int]) -> str:
    return ", ".join(map(str, items))
