"""The picture of one chain: the gap of each link and the three terms that it is the sum of, each on its own axis."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from theory.style import BLUE, GREEN, ORANGE, PURPLE, RED, mosaic, styled

if TYPE_CHECKING:
    from theory.real_run.decomposition import Decomposition


@styled
def chain_gap(result: Decomposition, path: Path) -> Path:
    """Draw a decomposition, one quantity per panel.

    Above, the gap of each link and the terms that it is the sum of; below, the loss at the knots, the share of the gap
    that training a link took, and the gap of each layer.

    Args:
        result: of the chain.
        path: of the PNG file.
    """
    figure, axes = mosaic([["gap", "drop", "bend", "error"], ["loss", "share", "layers", "layers"]], 10.6, 5.9)
    T = result.low.size
    links = np.arange(1, T + 1)
    terms = result.terms
    bend = result.eta * result.curvature / 2
    figure.suptitle(
        f"Frank-Wolfe gap of a chain of {T} links: gap = loss drop + curvature + oracle error (scales differ)",
        fontsize=10.5,
        x=0.01,
        ha="left",
    )
    _interval(axes["gap"], links, result.low, result.high, BLUE)
    _title(axes["gap"], "gap at the start of a link", float(result.low.mean()))
    _bars(axes["drop"], links, -np.diff(result.loss) / result.eta, GREEN)
    _title(axes["drop"], "loss drop of the link / η", terms["loss drop"])
    _bars(axes["bend"], links, bend, ORANGE)
    _title(axes["bend"], "curvature term η c / 2", terms["curvature"])
    _interval(axes["error"], links, result.error_low, result.error_high, RED)
    _title(axes["error"], "oracle error: left to gain", terms["oracle error"])
    axes["gap"].set_ylabel("nats")

    axes["loss"].plot(np.arange(T + 1), result.loss, "o-", color=GREEN)
    axes["loss"].set_xticks(range(T + 1), ["start", *(f"knot {k}" for k in links[:-1]), "end"])
    axes["loss"].set_ylabel("nats")
    axes["loss"].set_title("loss on the probe's batches", loc="left")

    low, high = 100 * result.alignment.min(axis=1), 100 * result.alignment.max(axis=1)
    _interval(axes["share"], links, low, high, PURPLE)
    axes["share"].set_ylabel("% of the gap")
    axes["share"].set_title("share ρ that the link took of its gap", loc="left")

    for name in ("gap", "drop", "bend", "error", "share"):
        axes[name].set_xticks(links)
        axes[name].set_xlim(0.4, T + 0.6)
        axes[name].set_xlabel("link")
    _layers(figure, axes["layers"], result)
    figure.savefig(path)
    return path


def _title(axes: Any, words: str, average: float) -> None:
    axes.set_title(f"{words}\naverage {average:.3g}", loc="left")


def _interval(axes: Any, x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> None:
    """The certified interval of a quantity per link, on an axis that begins at zero."""
    middle = (low + high) / 2
    axes.errorbar(x, middle, yerr=(high - low) / 2, fmt="o", color=colour, capsize=4)
    axes.set_ylim(min(0.0, 1.15 * float(low.min())), 1.15 * float(high.max()))


def _bars(axes: Any, x: np.ndarray, heights: np.ndarray, colour: str) -> None:
    bars = axes.bar(x, heights, color=colour, width=0.55)
    axes.bar_label(bars, [f"{height:.2g}" for height in heights], fontsize=7.5, padding=2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.18)
    axes.grid(False, axis="x")


def _layers(figure: Any, axes: Any, result: Decomposition) -> None:
    """The gap of each layer, as colours, with numbers where they fit."""
    paths, T = list(result.per_layer), result.low.size
    share = np.array([result.per_layer[path][:, 0] for path in paths])
    image = axes.imshow(share, aspect="auto", cmap="cividis", vmin=min(0.0, float(share.min())))
    axes.grid(False)
    axes.set_xticks(range(T), [str(k + 1) for k in range(T)])
    axes.set_yticks(range(len(paths)), [_short(path) for path in paths], fontsize=6.5 if len(paths) > 8 else 7.5)
    axes.set_xlabel("link")
    axes.set_title("gap of each layer, nats (lower ends)", loc="left")
    if len(paths) * T <= 60:
        bright = float(np.nanmax(share)) / 2
        for (row, k), value in np.ndenumerate(share):
            colour = "black" if value > bright else "white"
            axes.text(k, row, f"{value:.2g}", ha="center", va="center", fontsize=6.5, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.9)


def _short(path: str) -> str:
    """The end of a module path: layer number and name."""
    parts = path.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return f"{numbers[-1]}.{parts[-1]}" if numbers and not parts[-1].isdigit() else parts[-1]
