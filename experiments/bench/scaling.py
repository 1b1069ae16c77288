"""The growth of a knot's cost with layers, width, rank and chain length, against the expected slopes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from cola import ChainOptimizer, LinkConfig, NeverKnots
from experiments.bench import models
from experiments.bench.measure import CLOCKS, Row, Settings, Spread
from experiments.report import style


@dataclass(frozen=True)
class Curve:
    """Milliseconds of a knot against one quantity.

    Attributes:
        name: of the quantity.
        x: its values.
        knot, add: median milliseconds of a knot, and of ``W.add_`` on the same weights.
        slope: of log knot in log x over the upper half of x.
        expected: the slope expected there.
        why: the reason in words.
        slack: the tolerated difference of the slope.
    """

    name: str
    x: Sequence[int]
    knot: Sequence[float]
    add: Sequence[float]
    slope: float
    expected: float
    why: str
    slack: float


def cases() -> Iterator[tuple[str, object]]:
    """Name and function of the group."""
    yield "scaling", rows


def rows(settings: Settings) -> Iterator[Row]:
    """A row per quantity, with the slope of its curve."""
    for curve in curves(settings):
        yield Row(
            f"scaling/{curve.name}", f"slope of a knot's time in {curve.name}, {curve.x[len(curve.x) // 2]} to "
            f"{curve.x[-1]} ({curve.why})", Spread.of([curve.slope]), curve.expected + curve.slack,
            limit=curve.expected, limited_by=curve.why, details=asdict(curve),
        )  # fmt: skip


def curves(settings: Settings) -> list[Curve]:
    """Measure all four."""
    small = settings.smoke
    by_layers = [1, 2, 4] if small else [1, 2, 4, 8, 16, 32, 64]
    by_width = [32, 64, 128] if small else [256, 512, 1024, 2048, 4096]
    by_rank = [1, 2, 4] if small else [1, 2, 4, 8, 16, 32, 64, 128, 256]
    by_length = [1, 2, 4] if small else [1, 2, 4, 8, 16, 32, 64, 128]
    return [
        _curve("layers", by_layers, [knot(n, 512, 8, settings) for n in by_layers], 1.0, "each is tied once"),
        _curve("width", by_width, [knot(1, n, 8, settings) for n in by_width], 2.0, "elements of W"),
        _curve("rank", by_rank, [knot(1, 1024, r, settings) for r in by_rank], 1.0, "FLOPs r·d², once they outweigh "
               "reading W"),
        _curve("chain length", by_length, lengths(by_length, 512, settings), 0.0, "a knot does not look back"),
    ]  # fmt: skip


def knot(layers: int, width: int, rank: int, settings: Settings) -> tuple[float, float]:
    """Median milliseconds of a knot of ``layers`` square layers, and of ``W.add_``."""
    opt = make(layers, width, rank)
    clock = CLOCKS[settings.clock]
    weights = [p for p in opt.model.parameters() if p.shape == (width, width)]
    other = torch.zeros(width, width)
    ties, adds = [], []
    with torch.no_grad():
        for _ in range(3 if settings.smoke else 9):
            fill(opt, settings)
            started = clock()
            opt.tie()
            ties.append(clock() - started)
            started = clock()
            for weight in weights:
                weight.add_(other)
            adds.append(clock() - started)
    return float(np.median(ties[2:])) * 1e3, float(np.median(adds[2:])) * 1e3


def lengths(points: Sequence[int], width: int, settings: Settings) -> list[tuple[float, float]]:
    """Median milliseconds of the knots around each length of one chain."""
    opt = make(1, width, 8)
    clock = CLOCKS[settings.clock]
    times = []
    for _ in range(points[-1] + 4):
        fill(opt, settings)
        started = clock()
        opt.tie()
        times.append(clock() - started)
    # the first knot also takes the base's fingerprint: lengths count from the second
    return [(float(np.median(times[max(1, p - 3) : p + 4])) * 1e3, math.nan) for p in points]


def make(layers: int, width: int, rank: int) -> ChainOptimizer:
    """A chain on a stack of square layers."""
    return ChainOptimizer(
        torch.optim.AdamW, models.stack(layers, width), NeverKnots(),
        link=LinkConfig(r=rank, target_modules="all-linear"), lr=1e-3,
    )  # fmt: skip


@torch.no_grad()
def fill(opt: ChainOptimizer, settings: Settings) -> None:
    """Give the link a B as after training."""
    g = settings.generator()
    for name, parameter in opt.model.named_parameters():
        if name.endswith("lora_B"):
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 1e-4)


def _curve(name: str, x: Sequence[int], points: list[tuple[float, float]], expected: float, why: str) -> Curve:
    knots, adds = [p[0] for p in points], [p[1] for p in points]
    upper = len(x) // 2
    slope = float(np.polyfit(np.log(x[upper:]), np.log(knots[upper:]), 1)[0])
    return Curve(name, x, knots, adds, slope, expected, why, 0.15)


def draw(found: Sequence[Curve], path: Path) -> None:
    """The time of one knot against each quantity on one logarithmic scale, with the growth that is expected."""
    pyplot = style.pyplot()
    with pyplot.rc_context({**style.SETTINGS, "font.size": 9}):
        figure, panels = pyplot.subplots(
            1, len(found), figsize=(3.0 * len(found) + 0.4, 3.5), layout="constrained", sharey=True, squeeze=False
        )
        figure.suptitle("Time of one knot against layers, width, rank and links", x=0.01, ha="left", fontsize=11)
        for axes, curve in zip(panels[0], found):
            x, knots = np.array(curve.x, dtype=float), np.array(curve.knot)
            guide = knots[-1] * (x / x[-1]) ** curve.expected
            power = {0.0: "the same for all", 1.0: f"in proportion to {curve.name}"}
            label = power.get(curve.expected, f"in proportion to {curve.name}²")
            axes.loglog(x, guide, "--", color="#999999", label=label)
            if not any(math.isnan(value) for value in curve.add):
                axes.loglog(x, curve.add, ":s", color=style.ORANGE, markersize=4, label="adding a matrix to W alone")
            axes.loglog(x, knots, "-o", color=style.BLUE, markersize=5, label="one knot")
            axes.set_xscale("log", base=2)
            shown = x[:: 1 if len(x) <= 5 else 2]
            axes.set_xticks(shown, [f"{value:g}" for value in shown])
            axes.minorticks_off()
            axes.set_xlabel("links before it" if curve.name == "chain length" else curve.name)
            axes.set_title(f"{curve.name}: {curve.why}", loc="left", fontsize=8)
            axes.grid(axis="y", color="#dddddd", linewidth=0.5)
            handles, labels = axes.get_legend_handles_labels()
            axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=7.5, loc="upper left")
        everything = [value for curve in found for value in (*curve.knot, *curve.add) if not math.isnan(value)]
        panels[0][0].set_ylim(min(everything) / 1.5, 12 * max(everything))
        panels[0][0].set_ylabel("milliseconds")
        panels[0][0].yaxis.set_major_formatter("{x:g}")
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
