"""The picture of one chain: the gap of each link, the terms of the average gap, and the gap of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from theory.style import BLUE, GREEN, ORANGE, RED, canvas, styled

if TYPE_CHECKING:
    from theory.real_run.decomposition import Decomposition, Probe


@styled
def chain_gap(result: Decomposition, probes: Mapping[int, Probe], path: Path) -> Path:
    """Draw a decomposition: links on the left, terms in the middle, layers on the right.

    Args:
        result: of the chain. probes: per link, with sigma_1 of the layers. path: of the PNG file.
    """
    figure, (links, terms, layers) = canvas(1, 3, 10.2, 3.5)
    T = result.low.size
    t = np.arange(T)
    for low, high, colour, marker, label, shift in (
        (result.low, result.high, BLUE, "o", "gap $g_t$", -0.08),
        (result.error_low, result.error_high, RED, "s", r"oracle error $\varepsilon_t$", 0.08),
    ):
        middle = (low + high) / 2
        links.errorbar(t + shift, middle, yerr=(high - low) / 2, fmt=marker, color=colour, label=label, capsize=3)
    for k in range(T):
        low, high = sorted(result.alignment[k])
        text = rf"$\rho$={low:.2g}" if high - low < 0.1 * high else rf"$\rho$={low:.2g}–{high:.2g}"
        links.annotate(
            text, (t[k], result.high[k]), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7.5
        )
    links.set_xticks(t)
    links.set_xlim(-0.6, T - 0.4)
    links.set_ylim(bottom=0, top=1.25 * float(result.high.max()))
    links.set_xlabel("link")
    links.set_ylabel("nats")
    links.set_title("gap at the start of each link", loc="left")
    links.legend(loc="lower left")

    values = result.terms
    colours = {"loss drop": GREEN, "curvature": ORANGE, "oracle error": RED}
    names = [*values, "average gap"]
    heights = [*values.values(), float(result.low.mean())]
    bars = terms.bar(names, heights, color=[*colours.values(), BLUE], width=0.6)
    terms.bar_label(bars, [f"{h:.3g}" for h in heights], fontsize=7.5, padding=2)
    terms.axhline(0, color="black", linewidth=0.8)
    terms.set_xticks(range(4), ["loss drop\n/ ηT", "curvature\nη avg c / 2", "oracle\nerror", "average\ngap"])
    terms.margins(y=0.15)
    terms.grid(False, axis="x")
    terms.set_title("where the average gap went", loc="left")

    paths = list(result.per_layer)
    share = np.array([result.per_layer[p][:, 0] for p in paths])
    image = layers.imshow(share, aspect="auto", cmap="cividis", vmin=min(0.0, float(share.min())))
    layers.grid(False)
    layers.set_xticks(range(T), [str(k) for k in t])
    layers.set_yticks(range(len(paths)), [_short(p) for p in paths], fontsize=6.5 if len(paths) > 8 else 7.5)
    layers.set_xlabel("link")
    if len(paths) * T <= 60:
        bright = float(np.nanmax(share)) / 2
        for row, p in enumerate(paths):
            for k in range(T):
                sigma = probes[k].layers[p].sigma[0]
                layers.text(
                    k,
                    row,
                    f"{sigma:.2g}",
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color="black" if share[row, k] > bright else "white",
                )
        layers.set_title(r"gap per layer (colour), $\sigma_1$ (digits)", loc="left")
    else:
        layers.set_title("gap per layer", loc="left")
    figure.colorbar(image, ax=layers, shrink=0.9)
    figure.savefig(path)
    return path


def _short(path: str) -> str:
    """The end of a module path: layer number and name."""
    parts = path.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return f"{numbers[-1]}.{parts[-1]}" if numbers and not parts[-1].isdigit() else parts[-1]
