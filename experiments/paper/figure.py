"""Reproduce Figure 2 (chain lengths, from Table 3) or Figure 3 (rank step-down, from Table 4).

    python -m experiments figure 2 [the options of `table`]

The runs are those of the table: after `table 3`, `figure 2` runs nothing.
"""

from __future__ import annotations

import argparse

from experiments.paper import figures
from experiments.paper.reproduce import add_run_arguments, reproduce
from experiments.paper.tables import FIGURES, TABLES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m experiments figure`."""
    parser.add_argument("number", type=int, choices=list(FIGURES), help="the paper's figure")
    add_run_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m experiments figure`: 0; 1 if a run of this shard is missing or diverged; 2 for bad arguments."""
    number = arguments.number
    result = reproduce(TABLES[FIGURES[number]], arguments, f"figure {number}")
    if isinstance(result, int):
        return result
    if not result.shown:
        return result.status
    draw = {2: figures.chain_lengths, 3: figures.rank_step_down}[number]
    paths = draw(result.table, arguments.out / f"figure{number}", **result.about)
    print(result.table.text())
    return result.end(paths)
