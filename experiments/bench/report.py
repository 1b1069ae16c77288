"""The table, as Markdown, and everything else, as JSON."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from dataclasses import asdict

import torch

from experiments.bench import cost, scaling
from experiments.bench.measure import Row, Settings
from experiments.files import write_json
from experiments.hardware import describe_gpu, describe_processor, versions

#: the files that every run writes
FILES = ("bench.md", "bench.json")
PACKAGES = ("torch", "transformers", "peft", "loralib", "numpy")


def write(rows: Sequence[Row], settings: Settings, arguments: argparse.Namespace, minutes: float) -> str:
    """Write ``bench.json``, ``bench.md`` and, where it was measured, ``scaling.png``; returns the Markdown."""
    text = markdown(rows, settings, arguments, minutes)
    (arguments.out / "bench.md").write_text(text + "\n")
    written = {
        "hardware": hardware(settings), "threads": threads(arguments), "versions": versions(*PACKAGES),
        "minutes": minutes, "settings": asdict(settings),
        "rows": [asdict(row) | {"reached": row.reached, "out_of_reach": row.out_of_reach} for row in rows],
    }  # fmt: skip
    write_json(arguments.out / "bench.json", written)
    curves = [scaling.Curve(**row.details) for row in rows if row.name.startswith("scaling/")]  # type: ignore[arg-type]
    if curves:
        scaling.draw(curves, arguments.out / "scaling.png")
    return text


def markdown(rows: Sequence[Row], settings: Settings, arguments: argparse.Namespace, minutes: float) -> str:
    """The table: measured, target, verdict, limit; then the reasons for the distance, once per kind."""
    reached = [row.reached for row in rows if row.reached is not None]
    out_of_reach = sum(row.out_of_reach and row.reached is False for row in rows)
    lines = [
        f"{hardware(settings)}, {threads(arguments)} thread(s), Python {platform.python_version()}, "
        + ", ".join(f"{name} {number}" for name, number in versions(*PACKAGES).items())
        + f"; {settings.clock} time; {minutes:.1f} minutes; {sum(reached)} of {len(reached)} targets reached"
        + (f", {out_of_reach} of the others lie below their floors" if out_of_reach else "")
        + ("; SMOKE: the figures mean nothing" if settings.smoke else "")
        + ".",
        "",
        "| row | what | median (10–90 %) | target | | floor | limit | details |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        target = "" if row.target is None else f"{'≥' if row.at_least else '≤'} {row.target:g}"
        floor = "" if row.floor is None else f"{row.floor.median:.3g} ({row.floor.low:.3g}–{row.floor.high:.3g})"
        limit = "" if row.limit is None else f"{row.limit:.3g}"
        cells = (row.name, row.what, row.value, target, verdict(row), floor, limit, details(row))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if any(row.name.startswith("cost/") for row in rows):
        lines += ["", cost.table(rows)]
    kinds: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.limited_by:
            kinds.setdefault((row.limited_by, row.between), []).append(row.name)
    if kinds:
        lines += ["", "Limits, and the reasons for the distance:", ""]
    for (limited_by, between), names in kinds.items():
        lines.append(f"- {shortened(names)}: {limited_by}" + (f"; {between}" if between else "") + ".")
    return "\n".join(lines)


def verdict(row: Row) -> str:
    """PASS, FAIL or nothing; `~` if the middle 80 % of the rounds span the target; WRONG for wrong results.

    `FLOOR` instead of FAIL if the target lies below the time of the same products alone.
    """
    if row.right is False:
        return "WRONG"
    if row.reached is None or row.target is None:
        return ""
    between = row.value.count > 1 and row.value.low < row.target < row.value.high
    missed = "FLOOR" if row.out_of_reach else "FAIL"
    return ("PASS" if row.reached else missed) + ("~" if between else "")


def details(row: Row) -> str:
    """Other figures, in short."""
    numbers = [(key, value) for key, value in row.details.items() if isinstance(value, (int, float))]
    return "" if row.name.startswith("scaling/") else ", ".join(f"{key} {value:.4g}" for key, value in numbers)


def shortened(names: Sequence[str]) -> str:
    """`a/b`, `a/c` as one; a count where there are many."""
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more of {names[0].split('/')[0]}"


def hardware(settings: Settings) -> str:
    """The processor, and the GPU if it was measured."""
    gpu = describe_gpu() if settings.device == "cuda" else None
    return f"{gpu}; {describe_processor()}" if gpu else describe_processor()


def threads(arguments: argparse.Namespace) -> int:
    """The number of torch's threads in this run."""
    return arguments.threads or torch.get_num_threads()
