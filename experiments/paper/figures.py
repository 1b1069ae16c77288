"""Reproduce Figure 2 (chain lengths, from Table 3) or Figure 3 (rank step-down, from Table 4).

    python -m experiments figure 2 [the options of `table`]

The runs are those of the table: after `table 3`, `figure 2` runs nothing. Our means with their standard deviations are
drawn next to the paper's. A missing score leaves a gap and is named in the panel.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.files import write_json
from experiments.paper.reproduce import add_run_arguments, reproduce
from experiments.paper.score_table import Column, Entry, Row, Table
from experiments.paper.tables import FIGURES, TABLES
from experiments.report import style

OURS = {"color": style.BLUE, "marker": "o", "linestyle": "-", "label": "ours"}
PAPER = {"color": style.VERMILION, "marker": "s", "linestyle": "--", "label": "paper"}
_LINE = {"linewidth": 1.6, "markersize": 5.5, "capsize": 3.5, "elinewidth": 1.1, "markeredgecolor": "white"}
_GREY = "#555555"
_SHIFT = 0.06  # of a step, to keep the two error bars of a point apart
_WIDE = 3  # panels in a line
_PER_INCH = 13  # characters of a line of the title


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m experiments figure`."""
    parser.add_argument("number", type=int, choices=list(FIGURES), help="the paper's figure")
    add_run_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m experiments figure`: 0; 1 if a run diverged; 2 for bad arguments."""
    number = arguments.number
    result = reproduce(TABLES[FIGURES[number]], arguments, f"figure {number}")
    if isinstance(result, int):
        return result
    if not result.shown:
        return result.status
    draw = {2: chain_lengths, 3: rank_step_down}[number]
    paths = draw(result.table, arguments.out / f"figure{number}", **result.about)
    print(result.table.text())
    return result.end(paths)


def chain_lengths(table: Table, stem: Path, **about: Any) -> list[Path]:
    """Figure 2: a panel per task, the score (mean ± standard deviation over seeds) against the length of the chain.

    Args:
        table: Table 3, a row per length in rising order.
        stem: the files are stem.png, stem.pdf and stem.json.
        about: more for the JSON.

    Returns:
        The paths written.
    """
    ticks = [row.short or row.label for row in table.rows]
    return _draw(table, stem, about, table.columns, lambda column: ticks, "chain length", reference=None)


def rank_step_down(table: Table, stem: Path, **about: Any) -> list[Path]:
    """Figure 3: a panel per task, the score against the second link's rank, with the saved FLOPs below.

    Args:
        table: Table 4: LoRA, drawn as a horizontal line, then a row per rank of the second link. The columns of FLOPs
            have the task's key with `:flops` appended.
        stem: the files are stem.png, stem.pdf and stem.json.
        about: more for the JSON.

    Returns:
        The paths written.
    """
    referred = {row.reference for row in table.rows}
    reference = next((row for row in table.rows if row.key in referred), None)
    tasks = [column for column in table.columns if column.higher_is_better is not None]

    def ticks(column: Column) -> list[str]:
        lines = []
        for row in (row for row in table.rows if row is not reference):
            saved = table.entries.get((row.key, f"{column.key}:flops"), Entry()).mean
            lines.append(f"{row.short or row.label}\n{'' if saved is None else _short(saved)}")
        return lines

    xlabel = "ranks of the two links; FLOPs saved (ours)"
    return _draw(table, stem, about, tasks, ticks, xlabel, reference=reference)


def _draw(
    table: Table,
    stem: Path,
    about: Mapping[str, Any],
    columns: Sequence[Column],
    ticks: Callable[[Column], list[str]],
    xlabel: str,
    reference: Row | None,
) -> list[Path]:
    pyplot = style.pyplot()
    rows = [row for row in table.rows if row is not reference]
    across = min(_WIDE, len(columns))
    down = -(-len(columns) // across)
    with pyplot.rc_context({**style.SETTINGS, "svg.hashsalt": stem.name}):
        width = max(5.0, 3.5 * across + 0.4)
        figure, panels = pyplot.subplots(
            down, across, figsize=(width, 2.9 * down + 1.1), squeeze=False, layout="constrained"
        )
        handles: dict[str, Any] = {}
        for axes, column in zip(panels.flat, columns):
            _panel(axes, table, rows, column, ticks(column), reference, handles)
        for axes in panels.flat[len(columns) :]:
            axes.set_visible(False)
        figure.supxlabel(xlabel, fontsize=10)
        figure.supylabel("score, %", fontsize=10)
        if handles:
            title = f"{table.title}; bars: standard deviation over seeds"
            figure.legend(
                handles.values(), handles.keys(), loc="outside upper center", ncols=4 if across > 1 else 2,
                frameon=False, title=textwrap.fill(title, round(_PER_INCH * width)),
            )  # fmt: skip
        stem.parent.mkdir(parents=True, exist_ok=True)
        paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".pdf", ".json")]
        figure.savefig(paths[0], dpi=150, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"CreationDate": None})
        pyplot.close(figure)
    write_json(paths[2], {**about, **points(table)})
    return paths


def points(table: Table) -> dict[str, Any]:
    """The figure's data as JSON values: a list of points per task; missing values are None."""
    return {
        "title": table.title,
        "seeds": list(table.seeds),
        "missing": table.missing(),
        "panels": {
            column.key: [
                {
                    "row": row.key,
                    "mean": entry.mean,
                    "std": entry.std,
                    "n": len(entry.finite),
                    "paper": entry.paper,
                    "paper_std": entry.paper_std,
                }
                for row in table.rows
                if (entry := table.entries.get((row.key, column.key))) is not None
            ]
            for column in table.columns
        },
    }


def _panel(
    axes: Any,
    table: Table,
    rows: Sequence[Row],
    column: Column,
    ticks: Sequence[str],
    reference: Row | None,
    handles: dict[str, Any],
) -> None:
    entries = [table.entries.get((row.key, column.key), Entry()) for row in rows]
    series = (
        (OURS, -_SHIFT, [(entry.mean, entry.std) for entry in entries]),
        (PAPER, _SHIFT, [(entry.paper, entry.paper_std) for entry in entries]),
    )
    for line, shift, values in series:
        # matplotlib leaves a gap where a value is NaN
        means = [float("nan") if mean is None else mean for mean, _ in values]
        if all(mean is None for mean, _ in values):
            continue
        spread = [0.0 if std is None else std for _, std in values]
        handles[line["label"]] = axes.errorbar(
            [place + shift for place in range(len(rows))], means, yerr=spread, **line, **_LINE
        )
    if reference is not None:
        base = table.entries.get((reference.key, column.key), Entry())
        for line, value in ((OURS, base.mean), (PAPER, base.paper)):
            if value is not None:
                across = axes.axhline(value, color=line["color"], linestyle=":", linewidth=1.3, zorder=0)
                handles[f"{reference.label}, {line['label']}"] = across
    absent = [row.short or row.label for row, entry in zip(rows, entries) if len(entry.finite) < len(table.seeds)]
    for place, entry in enumerate(entries):
        if entry.mean is not None and len(entry.finite) < len(table.seeds):  # an open marker for fewer seeds
            edge = {"markeredgecolor": OURS["color"], "markersize": _LINE["markersize"]}
            axes.plot(place - _SHIFT, entry.mean, OURS["marker"], color="white", zorder=5, **edge)
    if absent:
        axes.annotate(
            f"not complete: {', '.join(absent)}", (0.02, 0.02), xycoords="axes fraction", fontsize=7.5, color=_GREY
        )
    axes.set_xticks(range(len(rows)), ticks)
    axes.set_xlim(-0.4, len(rows) - 0.6)
    axes.margins(y=0.14)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(column.label, loc="left", fontsize=10)


def _short(flops: float) -> str:
    """Such as `3.6·10¹¹`."""
    mantissa, _, exponent = f"{flops:.1e}".partition("e")
    return f"{mantissa}·10{str(int(exponent)).translate(_RAISED)}"


_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
