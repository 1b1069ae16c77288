"""Draws a chain. Imports matplotlib when called, and leaves the state of pyplot alone."""

import functools
import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cola.chain import spectrum
from cola.lora.link import Link

#: told apart by all forms of colour vision (Okabe and Ito), and darkened for text on white
_COLOURS = ("#0072B2", "#C65000", "#00805C", "#B0508C", "#946C00", "#000000", "#3B9BD4")
_GREY = "0.45"
_POINTS = 12  # numbers of links after which the rank is measured, and labels that an axis can take
_LARGE = 0.01  # of the largest singular value: directions above it do most of an update
_APART = 0.065  # between names at the right of a panel, as a share of its height
_TRACE = 1e-7  # of the largest singular value: those below are the rounding of fp32 factors

Layers = dict[str, list[str]]  # paths by kind


def figure(links: Iterable[Link]) -> Any:
    """A matplotlib Figure of up to four panels; see `Chain.plot`.

    Layers are drawn by kind (``q_proj``, ``fc1``, …): a line for their median, and a band from the smallest to the
    largest. Panels for which the links hold nothing are left out.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no links, or they hold nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("matplotlib is missing (pip install matplotlib)") from None
    chain = list(links)
    if not chain:
        raise ValueError("an empty chain has nothing to draw")
    kinds = layers_by_kind(dict.fromkeys(path for link in chain for path in (link.factors or link.report.layers)))
    panels: list[Callable[[Any], None]] = []
    if len(_losses(chain)[1]) > 1:
        panels.append(lambda axes: _loss(axes, chain))
    if any(link.report.layers for link in chain):
        panels.append(lambda axes: _moves(axes, chain, kinds))
    whole = chain[0].index == 0  # a framework may have dropped the first links
    if whole and all(link.factors for link in chain):
        panels.append(lambda axes: _spectrum(axes, chain, kinds))
    if whole and len(chain) > 1:
        panels.append(lambda axes: _rank(axes, chain, kinds))
    if not panels:
        raise ValueError("the chain has nothing to draw: its links have neither factors nor norms of layers")
    columns = len(panels) if len(panels) < 4 else 2
    rows = math.ceil(len(panels) / columns)
    drawn: Any = Figure(figsize=(6.4 * columns, 4.2 * rows), layout="constrained")
    drawn.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    for draw_panel, axes in zip(panels, drawn.subplots(rows, columns, squeeze=False).flat):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        draw_panel(axes)
    drawn.suptitle(_title(chain), x=0.01, ha="left", fontsize=13, fontweight="bold")
    drawn._repr_png_ = functools.partial(png, drawn)  # notebooks show it even where pyplot was never imported
    return drawn


def draw(links: Iterable[Link]) -> bytes:
    """The `figure` as a PNG; raises what that does."""
    return png(figure(links))


def png(drawn: Any) -> bytes:
    """A Figure as a PNG."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def layers_by_kind(layers: Iterable[str]) -> Layers:
    """Paths by kind of layer: paths that differ in numbers alone are of one kind.

    A kind has the shortest name that tells it from the others. If there are too many, the last part alone counts, and
    the smallest kinds are put together.

    >>> layers_by_kind(["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.0.mlp.c_fc"])
    {'attn.c_proj': ['h.0.attn.c_proj', 'h.1.attn.c_proj'], 'mlp.c_proj': ['h.0.mlp.c_proj'], 'c_fc': ['h.0.mlp.c_fc']}
    """
    whole: dict[tuple[str, ...], list[str]] = {}
    for path in layers:
        parts = tuple(part for part in path.split(".") if part and not part.isdigit())
        whole.setdefault(parts, []).append(path)
    if len(whole) > len(_COLOURS):
        last: dict[tuple[str, ...], list[str]] = {}
        for parts, paths in whole.items():
            last.setdefault(parts[-1:], []).extend(paths)
        whole = last
    found = {_shortest(parts, whole) if parts else _numbered(paths): paths for parts, paths in whole.items()}
    if len(found) > len(_COLOURS):
        order = sorted(found, key=lambda name: -len(found[name]))
        rest = order[len(_COLOURS) - 1 :]
        found = {name: paths for name, paths in found.items() if name not in rest} | {
            f"{len(rest)} other kinds": [path for name in rest for path in found[name]]
        }
    return found


def _shortest(parts: tuple[str, ...], others: Iterable[tuple[str, ...]]) -> str:
    """The fewest last parts that no other path ends with; of a long name the first and the last ones."""
    for length in range(1, len(parts) + 1):
        if sum(other[-length:] == parts[-length:] for other in others) == 1:
            kept = parts[-length:]
            return ".".join(kept if len(kept) <= 3 else (kept[0], "…", *kept[-2:]))
    return ".".join(parts)


def _numbered(paths: Sequence[str]) -> str:
    return f"layer {paths[0]}" if len(paths) == 1 else "layers"


# the panels


def _loss(axes: Any, chain: Sequence[Link]) -> None:
    steps, losses = _losses(chain)
    axes.plot(steps, losses, color=_COLOURS[0], marker="o", markersize=5)
    for link in chain:
        axes.axvline(link.step, color="0.85", linestyle=":", linewidth=1, zorder=0)
    shown = {link.step: link.index for link in chain}
    every = math.ceil(len(steps) / _POINTS)
    for step, loss in list(zip(steps, losses))[::-every][::-1]:
        axes.annotate(str(shown[step]), (step, loss), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    _titles(axes, "Training loss at the knots", "each point is the last step of a link, with the link's number")
    axes.set(xlabel="optimizer step", ylabel="training loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.15)


def _moves(axes: Any, chain: Sequence[Link], kinds: Layers) -> None:
    """``‖ΔW‖/‖W‖`` per link, or ``‖ΔW‖`` if no weight's norm is known."""
    known = all(layer.weight_norm for link in chain for layer in link.report.layers.values())
    tables = {
        name: np.array([[_move(link, path, known) for link in chain] for path in paths])
        for name, paths in kinds.items()
    }
    text = "as a share of the layer's weight" if known else "the weights' norms are not known"
    label = "‖ΔW‖ / ‖W‖ in %" if known else "‖ΔW‖ (Frobenius)"
    if len(chain) == 1:
        _titles(axes, "How far the link moved the layers", text, *_key(kinds, "dot: median layer, bar: range"))
        _dots(axes, {name: table[:, 0] for name, table in tables.items()})
        axes.set_xlabel(label)
        return
    _titles(axes, "How far each link moved the layers", text, *_key(kinds))
    _bands(axes, np.array([link.index for link in chain]), tables)
    axes.set(xlabel="link", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _spectrum(axes: Any, chain: Sequence[Link], kinds: Layers) -> None:
    tables = {}
    for name, paths in kinds.items():
        spectra = [spectrum.singular_values(_factors(chain, path)).numpy() for path in paths]
        found = [row for values in spectra for row in np.atleast_2d(values)]  # of fused experts a row each
        table = np.full((len(found), max(map(len, found))), np.nan)
        for row, values in zip(table, found):
            shown = values[values > values[0] * _TRACE]
            row[: len(shown)] = shown
        tables[name] = table
    width = max(table.shape[1] for table in tables.values())
    wide = {
        name: np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=np.nan)
        for name, table in tables.items()
    }
    dotted = ["dotted: the most that 1, 2, … links can have"] if len(chain) > 1 else []
    _titles(axes, "Singular values of the whole update", *_key(kinds), *dotted)
    _bands(axes, np.arange(1, width + 1), wide)
    reached = np.cumsum([_reach(link) for link in chain])
    for k in _some(len(chain))[:-1]:
        axes.axvline(reached[k - 1] + 0.5, color="0.75", linestyle=":", linewidth=1, zorder=0)
        place = (reached[k - 1] + 0.5, 1.0)
        axes.annotate(str(k), place, (0, 1), xycoords=("data", "axes fraction"), textcoords="offset points",
                      ha="center", va="bottom", fontsize=7, color=_GREY)  # fmt: skip
    axes.set(xlabel="index of the singular value", ylabel="singular value of Σ ΔW")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _rank(axes: Any, chain: Sequence[Link], kinds: Layers) -> None:
    """Reachable rank against the rank of the update, after some of the links."""
    reachable = np.cumsum([_reach(link) for link in chain])
    axes.plot(np.arange(1, len(chain) + 1), reachable, color="0.85", linewidth=8, solid_capstyle="butt")
    labels = [(float(reachable[-1]), "reachable: Σr", _GREY)]
    text, key = "what the links' ranks allow", list[str]()
    if all(link.factors for link in chain):
        some = _some(len(chain))
        layers = [path for paths in kinds.values() for path in paths]
        found = np.array([_ranks(chain, path, some) for path in layers], dtype=float)  # layer × point × 2
        names = "reached", f"σ above {100 * _LARGE:g} % of the largest"
        for i, name in enumerate(names):
            middle = _band(axes, np.array(some), found[:, :, i], _COLOURS[i], "os"[i], width=2.4 - i)
            labels.append((float(middle[-1]), name, _COLOURS[i]))
        text, key = f"{text}, and the update has", _key(kinds)
    _titles(axes, "Rank of the whole update", text, *key)
    axes.set(xlabel="links tied", ylabel="rank")
    axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    _label_ends(axes, labels)


# parts of panels


def _bands(axes: Any, x: Any, tables: dict[str, Any]) -> None:
    """A line and a band per kind, each with its name at its end; the scale is logarithmic if values differ widely."""
    values = np.concatenate([table.ravel() for table in tables.values()])
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive) and positive.max() > 30 * positive.min():
        axes.set_yscale("log")
        tables = {name: np.where(table > 0, table, np.nan) for name, table in tables.items()}
    labels = []
    for (name, table), colour, marker in zip(tables.items(), _COLOURS, "os^Dv<>"):
        middle = _band(axes, x, table, colour, marker)
        last = np.flatnonzero(np.isfinite(middle))
        if len(last):
            labels.append((float(middle[last[-1]]), f"{name} ({len(table)})" if len(table) > 1 else name, colour))
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    _label_ends(axes, labels)


def _band(axes: Any, x: Any, table: Any, colour: str, marker: str, width: float = 1.6) -> Any:
    """Draw the median and the range of the rows; returns the median."""
    there = np.isfinite(table).any(0)
    middle, low, high = (np.full(table.shape[1], np.nan) for _ in range(3))
    middle[there] = np.nanmedian(table[:, there], 0)
    low[there], high[there] = np.nanmin(table[:, there], 0), np.nanmax(table[:, there], 0)
    if len(table) > 1:
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        if len(x) == 1:
            axes.vlines(x, low, high, color=colour, alpha=0.4, linewidth=4)
    few = len(x) <= 2 * _POINTS
    axes.plot(x, middle, color=colour, marker=marker if few else None, markersize=4, linewidth=width)
    return middle


def _dots(axes: Any, values: dict[str, Any]) -> None:
    """Per kind a point for the median and a bar for the range."""
    for i, (value, colour) in enumerate(zip(values.values(), _COLOURS)):
        found = value[np.isfinite(value)]
        if len(found):
            axes.hlines(i, found.min(), found.max(), color=colour, alpha=0.35, linewidth=6)
            axes.plot([np.median(found)], [i], "o", color=colour, markersize=7)
    names = [f"{name} ({len(value)})" if len(value) > 1 else name for name, value in values.items()]
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlim=(0, 1.05 * axes.get_xlim()[1]))


def _label_ends(axes: Any, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write names to the right of the axes, at the height of their values but apart from each other."""
    low, high = axes.get_ylim()
    scale = math.log if axes.get_yscale() == "log" else float
    wanted = sorted(((scale(value) - scale(low)) / (scale(high) - scale(low)), text, c) for value, text, c in labels)
    for (height, text, colour), place in zip(wanted, spread([height for height, *_ in wanted], _APART)):
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
        axes.annotate(text, (1.0, height), (1.03, place), xycoords="axes fraction", textcoords="axes fraction",
                      color=colour, fontsize=9, va="center", annotation_clip=False, arrowprops=arrow)  # fmt: skip


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """The nearest heights, in least squares, that are at least ``apart`` from each other and between 0 and 1.

    Args:
        heights: from low to high.
        apart: small enough for all of them to fit.

    >>> [round(height, 2) for height in spread([0.5, 0.5, 0.9], 0.1)]
    [0.45, 0.55, 0.9]
    """
    groups: list[list[float]] = []  # of heights that touch each other, each less its place in line
    for i, height in enumerate(heights):
        groups.append([height - i * apart])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    top = max(0.0, 1 - (len(heights) - 1) * apart)
    means = [min(max(float(np.mean(group)), 0.0), top) for group in groups for _ in group]
    return [mean + i * apart for i, mean in enumerate(means)]


def _titles(axes: Any, title: str, *texts: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=30)
    place: Any = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate("; ".join(texts), (0, 1), (0, 16), fontsize=8.5, color=_GREY, **place)


def _title(chain: Sequence[Link]) -> str:
    ranks = [link.rank for link in chain]
    same = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    count, lost = chain[-1].index + 1, chain[0].index
    without = f" without the first {lost}, which are lost" if lost else ""
    layers = len(chain[-1].report.layers)
    return (
        f"Chain of {count} link{'s' if count > 1 else ''}{without}, {same}, {layers} layer{'s' if layers != 1 else ''}"
    )


def _key(kinds: Layers, text: str = "line: median layer, band: range") -> list[str]:
    """How several layers are drawn as one."""
    return [text] if any(len(paths) > 1 for paths in kinds.values()) else []


def _losses(chain: Sequence[Link]) -> tuple[list[int], list[float]]:
    known = [(link.step, link.report.loss) for link in chain if link.report.loss is not None]
    finite = [(step, loss) for step, loss in known if math.isfinite(loss)]
    return [step for step, _ in finite], [loss for _, loss in finite]


def _move(link: Link, path: str, known: bool) -> float:
    layer = link.report.layers.get(path)
    if layer is None:
        return math.nan
    return 100 * layer.share if known else layer.delta_norm


def _reach(link: Link) -> int:
    """The largest rank that a link can add: its products' columns in one layer."""
    return max((sum(A.shape[-2] for A, *_ in f.triples()) for f in link.factors.values()), default=link.rank)


def _some(count: int) -> list[int]:
    """At most `_POINTS` of the numbers from 1 to ``count``, the last one among them."""
    every = math.ceil(count / _POINTS)
    return list(range(count, 0, -every))[::-1]


def _factors(chain: Sequence[Link], path: str) -> list[Any]:
    return [link.factors[path] for link in chain if path in link.factors]


def _ranks(chain: Sequence[Link], path: str, counts: Sequence[int]) -> list[tuple[int, ...]]:
    """After so many links: the rank of a layer's update, and the number of its large singular values."""
    found, factors = [], _factors(chain, path)
    for values in spectrum.of_first(factors, [len(_factors(chain[:k], path)) for k in counts]):
        found.append(tuple(spectrum.count(values, factors[0], least) for least in (None, _LARGE)))
    return found


__all__ = ["draw", "figure", "layers_by_kind", "png"]
