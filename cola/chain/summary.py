"""A chain as a table: one row per link."""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cola.lora.link import Link, per_cent, small_share

_HTML_ROWS = 20  # of a longer chain a notebook shows the first and last ones


@dataclass(frozen=True)
class LinkRow:
    """One tied link.

    Attributes:
        index: place in the chain, from 0.
        step: optimizer steps taken before the knot.
        steps: those taken since the knot before; None if that is not known.
        rank: the link's rank, the largest where layers differ.
        delta_norm: ``‖ΔW‖`` over all layers.
        share: the largest ``‖ΔW‖ / ‖W‖`` of a layer; None if none is known.
        lost: the part of ``delta_norm`` that rounding lost.
        loss: the training loss of the step before the knot; None if none was seen.
        seconds: duration of the knot.
    """

    index: int
    step: int
    steps: int | None
    rank: int
    delta_norm: float
    share: float | None
    lost: float
    loss: float | None
    seconds: float


#: the columns of the table, and their headings
COLUMNS = {
    "index": "link", "step": "step", "steps": "steps", "rank": "rank", "delta_norm": "‖ΔW‖", "share": "‖ΔW‖/‖W‖ ≤",
    "lost": "lost", "loss": "loss",
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class ChainSummary:
    """The table of a chain; `print` shows it, and so does a notebook.

    Attributes:
        rows: one per link, in order.
        title: the chain in a line.

    >>> from cola import KnotReport
    >>> report = KnotReport(0, 100, 8, 2.0, 0.0, loss=3.0, seconds=0.1)
    >>> print(summary_of([Link(0, 0, {}, {}, report)], "one link"))
    one link
    link  step  steps  rank  ‖ΔW‖  ‖ΔW‖/‖W‖ ≤     lost  loss
    ----  ----  -----  ----  ----  ----------  -------  ----
    0      100    100     8     2           –  0.0e+00     3
    """

    rows: tuple[LinkRow, ...]
    title: str

    def __str__(self) -> str:
        return f"{self.title}\n{table(list(COLUMNS.values()), self.texts())}" if self.rows else self.title

    def __repr__(self) -> str:
        return f"ChainSummary({self.title})"

    def to_dict(self) -> dict[str, Any]:
        """``{"links": [{"index": 0, "step": …}, …]}`` as JSON values; a number that is not finite is None."""
        return {"links": [plain(asdict(row)) for row in self.rows]}

    def to_frame(self) -> Any:
        """The rows as a `pandas.DataFrame`, with the links' indices as its index.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError("to_frame() needs pandas: pip install pandas, or use to_dict()") from None
        names = list(LinkRow.__dataclass_fields__)
        return pandas.DataFrame([asdict(row) for row in self.rows], columns=names).set_index("index")

    def _repr_html_(self) -> str:
        title = f"<code>{html.escape(self.title)}</code>"
        cells, half = self.texts(), _HTML_ROWS // 2
        if not cells:
            return title
        if len(cells) > _HTML_ROWS:
            cells = [*cells[:half], ["…"] * len(COLUMNS), *cells[-half:]]
        lines = ["".join(f"<th>{html.escape(heading)}</th>" for heading in COLUMNS.values())]
        lines += ["".join(f"<td>{html.escape(text)}</td>" for text in row) for row in cells]
        return f"{title}<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"

    def texts(self) -> list[list[str]]:
        """The cells of the table, by row and column."""
        found = [{name: getattr(row, name) for name in COLUMNS} for row in self.rows]
        shown = [{**row, "share": per_cent(row["share"]), "lost": small_share(row["lost"])} for row in found]
        return [[cell(value) for value in row.values()] for row in shown]


def summary_of(links: Iterable[Link], title: str) -> ChainSummary:
    """The summary of links that follow each other."""
    rows: list[LinkRow] = []
    for link in links:
        numbers = link.report.to_dict()
        before = rows[-1].step if rows else 0 if link.index == 0 else None
        rows.append(LinkRow(**numbers, steps=None if before is None else link.step - before))
    return ChainSummary(tuple(rows), title)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns of equal width under their headings; the first one is left-aligned."""
    cells = [list(header), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def cell(value: Any) -> str:
    """A value as a table shows it: numbers with four digits, and a dash for None."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plain(value: Any) -> Any:
    """A value with infinities and NaN, which JSON lacks, replaced by null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
