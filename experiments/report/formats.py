"""A grid of text for a terminal, Markdown, CSV or LaTeX, with each format's special characters escaped."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Text:
    """One field, bold where the format has bold type. Two leading spaces indent it."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Grid:
    """Rows of fields under a header.

    Attributes:
        header: names of the columns.
        rows: each with as many fields as the header.
        left: number of text columns, aligned left; the columns after them are numbers, aligned right.
        groups: indices of the first rows of groups; a rule or an empty line separates groups.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]
    left: int = 1
    groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"row {[field.text for field in row]} has {len(row)} fields, the header {len(self.header)}"
                )


def aligned(grid: Grid) -> str:
    """Columns of equal width for a terminal."""
    lines = [[_one_line(name) for name in grid.header]]
    lines += [[_one_line(field.text) for field in row] for row in grid.rows]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(grid.header))]
    shown = ["  ".join(_pad(text, widths[i], i < grid.left) for i, text in enumerate(line)).rstrip() for line in lines]
    body: list[str] = []
    for index, line in enumerate(shown[1:]):
        if index and index in grid.groups:
            body.append("")
        body.append(line)
    return "\n".join([shown[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *body])


def markdown(grid: Grid) -> str:
    """A table of GitHub's Markdown."""
    rule = [":--" if i < grid.left else "--:" for i in range(len(grid.header))]
    rows = [[_field_markdown(field) for field in row] for row in grid.rows]
    lines = [[escape_markdown(name) for name in grid.header], rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(grid: Grid, caption: str = "", label: str = "") -> str:
    """A `table` with booktabs' rules, for a document that loads booktabs; any text is escaped."""
    columns = "l" * grid.left + "r" * (len(grid.header) - grid.left)
    body = []
    for index, row in enumerate(grid.rows):
        if index and index in grid.groups:
            body.append(r"\midrule")
        body.append(" & ".join(_field_latex(field) for field in row) + r" \\")
    lines = [
        r"\begin{table}",
        r"\centering",
        *([rf"\caption{{{escape_latex(caption)}}}"] if caption else []),
        *([rf"\label{{{label}}}"] if label else []),
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(escape_latex(name) for name in grid.header) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def csv_text(records: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> str:
    """`records` as CSV: text is quoted, numbers are bare and in full, None is an empty quoted field."""
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(fields)
    for record in records:
        writer.writerow(["" if record.get(name) is None else record[name] for name in fields])
    return out.getvalue()


def escape_markdown(text: str) -> str:
    """`text` escaped for a table of Markdown; line breaks become spaces."""
    return "".join("\\" + c if c in r"\|*_`<[]~$" else c for c in _one_line(text))


def escape_latex(text: str) -> str:
    """`text` escaped for LaTeX; line breaks become spaces."""
    shown = _one_line(text)
    # LaTeX joins two hyphens to a dash, and two apostrophes to a quotation mark
    return "".join(
        ("{}" if c == before and c in "-'" else "") + _LATEX.get(c, c) for before, c in zip(" " + shown, shown)
    )


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "`": r"\textasciigrave{}",
    "–": r"\textendash{}", "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "·": r"$\cdot$", "→": r"$\to$",
    "Σ": r"$\Sigma$", "₂": r"\textsubscript{2}", "Δ": r"$\Delta$",
}  # fmt: skip


def _field_markdown(field: Text) -> str:
    shown = escape_markdown(field.text).strip()
    indent = "&emsp;" if field.text.startswith("  ") else ""
    return indent + (f"**{shown}**" if field.bold and shown else shown)


def _field_latex(field: Text) -> str:
    shown = escape_latex(field.text).strip()
    indent = r"\quad " if field.text.startswith("  ") else ""
    return indent + (rf"\textbf{{{shown}}}" if field.bold and shown else shown)


def _one_line(text: str) -> str:
    return "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def _width(text: str) -> int:
    """Columns on a terminal: combining marks take none, East Asian wide characters two."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )  # fmt: skip


def _pad(text: str, width: int, left: bool) -> str:
    space = " " * (width - _width(text))
    return text + space if left else space + text
