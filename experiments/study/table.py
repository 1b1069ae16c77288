"""The tables of the study and of the demo: a column is a header and a function that formats a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from experiments.report import stats
from experiments.report.formats import Grid, Text, aligned
from experiments.study.arms import STUDY
from experiments.study.comparison import Row

Column = Callable[[Row], str]
MISSING = "–"


def _minus_reference(row: Row) -> str:
    if row.against is None:
        return ""
    limits = row.against.difference
    shown = f"{limits.mean:+.4f} ({limits.low:+.4f} to {limits.high:+.4f})"
    return shown if row.reference == "lora" else f"{shown} from {STUDY[row.reference or ''].label}"


STUDY_COLUMNS: Mapping[str, Column] = {
    "arm": lambda row: row.label,
    "rate": lambda row: f"{row.lr:g}",
    "test, {unit}": lambda row: f"{row.test.mean:.4f} ± {stats.deviation(row.tests):.4f}",
    "minus its reference (95 % CI)": _minus_reference,
    "p (Holm)": lambda row: "" if row.against is None else f"{row.against.p_holm:.2g}",
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
    lines = [[header.format(unit=unit) for header in STUDY_COLUMNS]]
    lines += [[show(row) for show in STUDY_COLUMNS.values()] for row in rows]
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(STUDY_COLUMNS), *body])


def _minus_lora(row: Row) -> str:
    if row.against is None:
        return MISSING
    limits = row.against.difference
    if math.isnan(limits.low):
        return f"{limits.mean:+.4f}"
    return f"{limits.mean:+.4f} [{limits.low:+.4f}, {limits.high:+.4f}]"


def _held_out(row: Row) -> str:
    return f"{row.test.mean:.4f}" + ("" if math.isnan(row.test.low) else f" ± {row.test.half_width:.4f}")


def _number(value: float, form: str, unit: str = "") -> str:
    return MISSING if math.isnan(value) else f"{value:{form}}{unit}"


DEMO_COLUMNS: Mapping[str, Column] = {
    "arm": lambda row: row.label,
    "lr": lambda row: f"{row.lr:g}",
    "knots": lambda row: f"{row.knots:.3g}",
    "held-out bits/byte": _held_out,
    "minus LoRA (95 %)": _minus_lora,
    "p (Holm)": lambda row: _number(row.against.p_holm if row.against else math.nan, ".2g"),
    "gap closed": lambda row: _number(100 * row.gap, ".0f", " %"),
    "trainable": lambda row: f"{row.parameters:,}",
    "seconds": lambda row: f"{row.seconds:.1f}",
}
"""Header -> the column."""


def demo_table(rows: Sequence[Row]) -> str:
    """The demo's table as aligned text; losses are in bits per byte."""
    lines = tuple(tuple(Text(show(row)) for show in DEMO_COLUMNS.values()) for row in rows)
    return aligned(Grid(tuple(DEMO_COLUMNS), lines))
