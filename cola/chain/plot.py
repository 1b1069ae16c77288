"""Draws a chain: the spectrum of its update, and how much each link added. Imports matplotlib when called."""

import io
from typing import Any

import numpy as np

from cola.chain.chain import Chain

_LABELS = 24  # rows that can be labelled without crowding


def draw(chain: Chain) -> bytes:
    """A PNG with two panels.

    Left: the singular values of ``Σ s B A`` per layer, with marks at the ranks that the first k links can reach.
    Right: ``‖ΔW_k‖`` per layer and link. The colours, cividis, read the same with and without colour vision.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the chain has no links.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("matplotlib is missing (pip install matplotlib)") from None
    layers = chain.layers()
    if not layers:
        raise ValueError("an empty chain has nothing to draw")
    names = short_names(layers)
    height = 4.2 + 0.13 * max(0, min(len(layers), 60) - 12)
    figure = Figure(figsize=(12, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = matplotlib.colormaps["cividis"](np.linspace(0, 0.92, len(layers)))
    _spectrum(left, chain, dict(zip(layers, names)), colours)
    _norms(figure, right, chain, names)
    figure.suptitle(f"{len(chain)} links, ranks {_short([link.rank for link in chain])}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def short_names(layers: list[str]) -> list[str]:
    """The paths without their common first parts.

    >>> short_names(["model.layers.0.q_proj", "model.layers.1.q_proj"])
    ['0.q_proj', '1.q_proj']
    """
    split = [layer.split(".") for layer in layers]
    shared = 0
    while len(split) > 1 and len({parts[shared] if shared < len(parts) else None for parts in split}) == 1:
        shared += 1
    return [".".join(parts[shared:]) or layer or "(model)" for parts, layer in zip(split, layers)]


def _spectrum(axes: Any, chain: Chain, names: dict[str, str], colours: Any) -> None:
    markers = "osD^v<>P"
    for i, (layer, name) in enumerate(names.items()):
        values = chain.singular_values(layer)
        shown = values[values > values[0] * 1e-7] if values[0] > 0 else values[:0]  # the precision of fp32 factors
        few = len(names) <= len(markers)
        style: dict[str, Any] = {"marker": markers[i], "linewidth": 1.4} if few else {"linewidth": 0.9}
        axes.plot(np.arange(1, len(shown) + 1), shown.numpy(), color=colours[i], label=name, markersize=4, **style)
    reached = np.cumsum([link.rank for link in chain])
    for k, rank in enumerate(reached[:12], start=1):
        axes.axvline(rank + 0.5, color="0.6", linestyle=":", linewidth=1)
        text = f"{k} link{'s' if k > 1 else ''}"
        axes.annotate(
            text, (rank + 0.5, 0.99), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="top", fontsize=7
        )
    axes.set(xlabel="index i", ylabel="singular value σᵢ of Σ s·B A", yscale="log", title="Spectrum of ΔW")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="0.9")
    if len(names) <= len(markers):
        axes.legend(fontsize=8, title="layer", loc="lower left")
    else:
        axes.text(0.02, 0.03, f"dark: {next(iter(names.values()))}\nlight: {list(names.values())[-1]}",
                  transform=axes.transAxes, fontsize=8)  # fmt: skip


def _norms(figure: Any, axes: Any, chain: Chain, names: list[str]) -> None:
    table = np.array(list(chain.norms().values()))
    image = axes.imshow(table, aspect="auto", cmap="cividis", interpolation="nearest", vmin=0)
    figure.colorbar(image, ax=axes, label="‖ΔWₖ‖ (Frobenius)")
    every = -(-len(names) // _LABELS)
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=8)
    steps = -(-len(chain) // 16)
    axes.set_xticks(range(0, len(chain), steps), [str(link.index) for link in chain][::steps])
    axes.set(xlabel="link k", title="What each link added, per layer")
    if table.size <= 60:
        for (row, column), value in np.ndenumerate(table):
            dark = value < 0.5 * table.max()
            axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=8, color="w" if dark else "k")


def _short(ranks: list[int]) -> str:
    return str(ranks) if len(ranks) <= 12 else f"[{', '.join(map(str, ranks[:6]))}, … {ranks[-1]}]"
