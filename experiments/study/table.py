"""The tables of the study and of the demo: a column is a header and a function that formats a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from experiments.report import stats
from experiments.report.formats import Grid, Text, aligned
from experiments.study.comparison import Row

Column = Callable[[Row], str]
MISSING = "–"


def _minus_reference(row: Row) -> str:
    shown = _difference(row)
    return shown if row.against is None or row.reference == "lora" else f"{shown} from {row.reference_label}"


STUDY_COLUMNS: Mapping[str, Column] = {
    "arm": lambda row: row.label,
    "rate": lambda row: _rate(row),
    "test, {unit}": lambda row: f"{row.test.mean:.4f} ± {stats.deviation(row.tests):.4f}",
    "minus its reference (95 % CI)": _minus_reference,
    "p (Holm)": lambda row: "" if row.against is None else _number(row.against.p_holm, ".2g"),
    "dev, first → last epoch": lambda row: f"{row.dev_by_epoch[0]:.4f} → {row.dev_by_epoch[-1]:.4f}",
    "train": lambda row: f"{row.train_loss:.4f}",
    "knots": lambda row: f"{row.knots:.3g}",
    "trained": lambda row: f"{row.parameters:,}",
}
"""Header -> the column; p is Holm's over all comparisons of the table."""


def study_table(rows: Sequence[Row], unit: str) -> str:
    """The study's table in Markdown.

    Args:
        rows: in order.
        unit: of their losses.
    """
    return _markdown(STUDY_COLUMNS, rows, unit)


FRONTIER_COLUMNS: Mapping[str, Column] = {
    "": lambda row: row.label,
    "KiB of trained state": lambda row: f"{row.state_bytes / 1024:,.0f}",
    "rate": lambda row: _rate(row),
    "test, {unit}": lambda row: _mean(row),
    "minus LoRA of r (95 % CI)": lambda row: _difference(row),
    "p (Holm)": lambda row: "" if row.against is None else _number(row.against.p_holm, ".2g"),
    "gap closed": lambda row: "" if row.against is None else _number(100 * row.gap, ".0f", " %"),
    "knots": lambda row: f"{row.knots:.3g}",
    "seconds": lambda row: f"{row.seconds:.0f}",
}
"""Header -> the column; the interval after ± is for the mean, and p is Holm's over the table."""


def frontier_table(rows: Sequence[Row], unit: str) -> str:
    """The frontier's table in Markdown; the arguments are as for `study_table`."""
    return _markdown(FRONTIER_COLUMNS, rows, unit)


def _markdown(columns: Mapping[str, Column], rows: Sequence[Row], unit: str) -> str:
    lines = [[header.format(unit=unit) for header in columns]]
    lines += [[show(row) for show in columns.values()] for row in rows]
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(columns), *body])


def _mean(row: Row) -> str:
    return f"{row.test.mean:.4f}" + ("" if math.isnan(row.test.low) else f" ± {row.test.half_width:.4f}")


def _rate(row: Row) -> str:
    return f"{row.lr:g}" + " (an edge)" * row.at_edge


def _difference(row: Row) -> str:
    return "" if row.against is None else row.against.difference.signed(4)


def _number(value: float, form: str, unit: str = "") -> str:
    return MISSING if math.isnan(value) else f"{value:{form}}{unit}"


DEMO_COLUMNS: Mapping[str, Column] = {
    "arm": lambda row: row.label,
    "KiB": lambda row: f"{row.state_bytes / 1024:,.0f}",
    "held-out bits/byte": lambda row: _mean(row),
    "minus LoRA (95 %)": lambda row: _difference(row) or MISSING,
    "gap closed": lambda row: _number(100 * row.gap, ".0f", " %") if row.against else MISSING,
    "knots": lambda row: f"{row.knots:.3g}",
    "lr": lambda row: f"{row.lr:g}",
    "seconds": lambda row: f"{row.seconds:.1f}",
}
"""Header -> the column; KiB are of trained state."""


def demo_table(rows: Sequence[Row]) -> str:
    """The demo's table as aligned text; losses are in bits per byte."""
    lines = tuple(tuple(Text(show(row)) for show in DEMO_COLUMNS.values()) for row in rows)
    return aligned(Grid(tuple(DEMO_COLUMNS), lines))
