"""The map: for every rank and length of run, which method is best at LoRA's bytes, and by how much.

    python -m experiments map --task slow --ranks 2 4 8 16 --steps 375 1500 6000

The rates are tuned as in `frontier`. A cell of the map shows the method with the lowest development loss, its test loss
minus LoRA's, and the interval of the paired difference over seeds. The picture has all maps of the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments import hardware
from experiments.command_line import count, repeated
from experiments.files import write_atomically, write_json
from experiments.frontier import families
from experiments.frontier.families import FAMILIES, lora
from experiments.frontier.frontier import UNTOLD, add_sweep, add_task, carry_out, plan_of, task_of
from experiments.frontier.tasks import lasting, require_text, room
from experiments.report import stats, style
from experiments.report.stats import Interval
from experiments.study.comparison import Results, inside
from experiments.sweep import SweepError, requested
from experiments.tiny import tiny_opt

TITLES = {"slow": "spectrum that falls slowly, $i^{-1/2}$", "steep": "spectrum that falls steeply, $i^{-3/2}$"}
"""The planted tasks, in words."""


@dataclass(frozen=True)
class Place:
    """One cell of the map.

    Attributes:
        rank: of the LoRA.
        steps: in a run.
        family: the best method by development loss, of all but LoRA.
        knots: of its runs, mean over seeds.
        difference: its test loss minus LoRA's, paired over seeds.
        rates: the chosen rates, its own and LoRA's.
        at_edge: whether one of them is an edge of those to choose from, so that a better one may lie beyond.
    """

    rank: int
    steps: int
    family: str
    knots: float
    difference: Interval
    rates: tuple[float, float]
    at_edge: bool | None = None  # None: the file was written before it was recorded

    def __str__(self) -> str:
        return self.difference.signed(3) + (", a rate at an edge" if self.at_edge else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m experiments map`."""
    add_task(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/map"), metavar="DIR", help="folder to write")
    parser.add_argument("--ranks", type=count, nargs="+", default=[2, 4, 8, 16], metavar="R", help="of the LoRAs")
    parser.add_argument("--steps", type=count, nargs="+", default=[375, 1500, 6000], metavar="N", help="of a run")
    add_sweep(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m experiments map`: 0; 1 if a run failed, or a cell of the map is missing; 2 for bad arguments."""
    tiny_opt.quiet()
    try:
        require_chains(arguments.methods)
        chosen = families.arms(arguments.ranks, ["lora", *arguments.methods], gate=False)
        task, cluster = task_of(arguments), requested(arguments)
        blocks = room(task)
        plans = {steps: plan_of(lasting(task, steps, blocks), chosen, arguments) for steps in arguments.steps}
        for steps, plan in plans.items():
            plan.require_possible("--ranks, --steps or --methods")
            require_text(plan.setting, steps)
    except (ValueError, OSError) as error:
        print(f"map: {error}", file=sys.stderr)
        return 2
    places = []
    try:
        for plan in plans.values():
            results = carry_out(plan, arguments, cluster)
            places += [place for rank in arguments.ranks if (place := best(results, rank)) is not None]
    except (OSError, SweepError) as error:
        print(f"map: {error}", file=sys.stderr)
        return 1
    if not places:
        print("map: no cell is complete yet", file=sys.stderr)
        return 1
    stem = arguments.out / f"map-{arguments.task}"
    shown = table(places, task.unit)
    command = repeated("map", add_arguments, arguments, without=UNTOLD)
    written = {"command": command, **hardware.provenance(), "unit": task.unit, "places": list(map(asdict, places))}
    write_atomically(stem.with_suffix(".md"), shown + "\n")
    write_json(stem.with_suffix(".json"), written)
    print(f"{shown}\n\n{stem}.md, .json; one folder per run in {arguments.out / 'cells'}")
    maps = {path.stem.removeprefix("map-"): read(path) for path in sorted(arguments.out.glob("map-*.json"))}
    print(style.picture(arguments.out / "map.png", lambda path: draw(maps, path)))
    missing = len(plans) * len(arguments.ranks) - len(places)
    if missing:
        print(f"map: {missing} cells are missing: runs diverged, or are not done yet", file=sys.stderr)
    return 1 if missing and not arguments.so_far else 0


def require_chains(methods: Sequence[str]) -> None:
    """Refuse methods whose win would not be a chain's.

    Raises:
        ValueError: there is no chain, or a method is neither a chain nor LoRA, or has another base than LoRA has.
    """
    methods_of = {name: family.method(1) for name, family in FAMILIES.items()}
    chains = [name for name, method in methods_of.items() if (method.kind, method.base) == ("cola", "AdamW")]
    other = [name for name in methods if name not in ("lora", *chains)]
    if other or not set(chains) & set(methods):
        raise ValueError(
            f"--methods {' '.join(methods)}: the map compares chains with LoRA, so "
            + (f"leave out {' and '.join(other)} (frontier takes it)" if other else f"give one of {', '.join(chains)}")
        )


def read(path: Path) -> list[Place]:
    """The places of a map that was written."""
    places = json.loads(path.read_text())["places"]
    return [Place(**{**place, "difference": _interval(**place["difference"])}) for place in places]


def _interval(mean: float, low: float | None, high: float | None) -> Interval:
    """As written: a single seed has no limits."""
    return Interval(mean, math.nan if low is None else low, math.nan if high is None else high)


def best(results: Results, rank: int) -> Place | None:
    """The cell of one rank, or None while runs of one of its methods are missing."""
    arms = {name: f"{name}-{rank}" for name in FAMILIES if f"{name}-{rank}" in results.plan.arms}
    if len(arms) < 2 or not all(map(results.complete, arms.values())):
        return None
    final = {name: results.final(arm) for name, arm in arms.items() if name != "lora"}
    name = min(final, key=lambda name: math.fsum(outcome["dev"] for outcome in final[name]))
    ours, theirs = (results.losses(arm) for arm in (arms[name], lora(rank)))
    return Place(
        rank,
        results.plan.setting.steps(),
        name,
        math.fsum(len(inside(outcome)) for outcome in final[name]) / len(ours),
        stats.t_interval([a - b for a, b in zip(ours, theirs)]),
        (results.chosen(arms[name])[0].lr, results.chosen(lora(rank))[0].lr),
        any(results.plan.searches[arm].at_edge(results.done) for arm in (arms[name], lora(rank))),
    )


def table(places: Sequence[Place], unit: str) -> str:
    """The map in Markdown: a row per rank, a column per length."""
    ranks, lengths = (sorted({getattr(place, name) for place in places}) for name in ("rank", "steps"))
    at = {(place.rank, place.steps): place for place in places}
    head = [f"minus LoRA, {unit}", *(f"{steps:,} steps" for steps in lengths)]
    lines = [head, ["---"] * len(head)]
    for rank in ranks:
        cells = [at.get((rank, steps)) for steps in lengths]
        lines.append([f"r = {rank}", *("–" if cell is None else f"{cell.family}: {cell}" for cell in cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(maps: Mapping[str, Sequence[Place]], path: Path) -> None:
    """Write the maps side by side as a PNG: blue where the best chain is below LoRA, red where it is above.

    The number is the difference with half its interval; it is bold where the interval leaves out zero and no rate is at
    an edge of its grid, which an asterisk marks.
    """
    pyplot = style.pyplot()
    with pyplot.rc_context(style.SETTINGS):
        figure, panels = pyplot.subplots(
            1, len(maps), figsize=(1 + 4.6 * len(maps), 4.2), layout="constrained", squeeze=False
        )
        figure.suptitle(
            "Does a chain beat LoRA of the same memory?\n"
            "Blue: its loss is lower; red: higher; bold: the 95 % interval excludes 0"
            + "; *: a rate at an edge" * any(place.at_edge for places in maps.values() for place in places),
            x=0.01, ha="left", fontsize=11,
        )  # fmt: skip
        for axes, (task, places) in zip(panels[0], maps.items()):
            ranks, lengths = (sorted({getattr(place, name) for place in places}) for name in ("rank", "steps"))
            largest = max(abs(place.difference.mean) for place in places) or 1.0
            grid = [[math.nan] * len(lengths) for _ in ranks]
            for place in places:
                x, y, limits = lengths.index(place.steps), ranks.index(place.rank), place.difference
                grid[y][x] = limits.mean
                sure = (limits.low > 0 or limits.high < 0) and not place.at_edge
                name = FAMILIES[place.family].name.replace(", ", ",\n")
                axes.annotate(
                    f"{limits.mean:+.3f}".replace("-", "−")
                    + ("" if math.isnan(limits.low) else f" ± {limits.half_width:.3f}")
                    + f"{'*' if place.at_edge else ''}\n{name}", (x, y), ha="center", va="center", fontsize=8,
                    weight="bold" if sure else "normal",
                )  # fmt: skip
            axes.imshow(grid, cmap="RdBu_r", vmin=-1.6 * largest, vmax=1.6 * largest, aspect="auto", origin="lower")
            axes.set_xticks(range(len(lengths)), [f"{steps:,}" for steps in lengths])
            axes.set_yticks(range(len(ranks)), [str(rank) for rank in ranks])
            axes.set_xlabel("optimizer steps")
            axes.set_ylabel("rank of the LoRA")
            axes.set_title(f"{TITLES.get(task, task)}: best chain minus LoRA", loc="left", fontsize=10)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
