"""The average Frank-Wolfe gap of a chain, split into loss drop, curvature and oracle error.

A chain is Algorithm 2 with ``V_t = W_t + B_t A_t / eta``: the trained link replaces the best vertex of K. For a
layer on the trace ball, ``g = delta sigma_1(G) + <G, dW>``, where ``G`` is the gradient at the frozen weight and ``dW``
the sum of the links so far; `theory.real_run.balls` has the other balls. The gaps of the layers add up over the product
set. delta is a choice, so it is reported together with sigma_1.

The decomposition is exact for any training: ``avg g = (L_1 - L_{T+1})/(eta T) + (eta/2) avg c + avg eps``. Chains
are too short for the theorem's bound to say anything, but the decomposition holds for them too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cola import Link
from theory.arguments import positive
from theory.real_run.balls import Ball
from theory.real_run.sketch import LowRankPair


@dataclass(frozen=True)
class LayerGap:
    """One layer at the start of one link.

    Attributes:
        sigma: leading singular values of ``Q'G``, as many as the ball needs; each is at most that of the gradient.
        residual: bound on ``|(I - QQ')G|`` in the spectral norm: 0 for an exact range, infinite on fresh batches.
        pairing: ``<G, dW_t>``. moved: ``<G, B_t A_t>``, negative if the link descends.
        scored: ``<G, -V>`` on fresh batches for the vertex V of radius 1 from the first pass, or None.
        side: the smaller side of the layer.
    """

    sigma: tuple[float, ...]
    residual: float
    pairing: float
    moved: float
    scored: float | None = None
    side: int = 0

    def strength(self, ball: Ball | int) -> tuple[float, float]:
        """The interval for the support of a ball of radius 1; a rank stands for the ball of atoms of that rank."""
        ball = Ball("rank", ball) if isinstance(ball, int) else ball
        return ball.support(np.array(self.sigma), self.residual, self.side or len(self.sigma))


@dataclass(frozen=True)
class Probe:
    """The measurements at the start ``W_t`` of link t; they do not depend on delta and eta."""

    link: int
    loss: float
    layers: Mapping[str, LayerGap]


@dataclass
class Decomposition:
    """The gaps of a chain and the terms of their average; arrays have one entry per link.

    Attributes:
        eta: the step. delta: radius per layer. ball: the kind of K (by default the trace ball).
        loss: (T+1,) ``L_1 .. L_{T+1}``. low, high: the interval of ``g_t``.
        error_low, error_high: the interval of ``eps_t = g_t + <G, B_t A_t>/eta``.
        alignment: (T, 2) both ends of ``rho_t = 1 - eps_t/g_t``.
        curvature: ``c_t``. distance2: ``|V_t - W_t|^2``.
        per_layer: path -> (T, 2) interval of the layer's gap. sides: path -> the layer's smaller side.
        others_moved: whether training moved other parameters than the adapters; ``c_t`` includes their effect.
    """

    eta: float
    delta: dict[str, float]
    ball: Ball
    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error_low: np.ndarray
    error_high: np.ndarray
    alignment: np.ndarray
    curvature: np.ndarray
    distance2: np.ndarray
    per_layer: dict[str, np.ndarray] = field(repr=False, default_factory=dict)
    others_moved: bool = False
    sides: dict[str, int] = field(repr=False, default_factory=dict)

    @property
    def rank(self) -> int:
        """The rank of the ball's atoms."""
        return self.ball.rank

    @property
    def terms(self) -> dict[str, float]:
        """The three terms that sum to the average gap (its lower end)."""
        T = self.low.size
        return {
            "loss drop": float(self.loss[0] - self.loss[-1]) / (self.eta * T),
            "curvature": self.eta / 2 * float(self.curvature.mean()),
            "oracle error": float(self.error_low.mean()),
        }

    @property
    def diameter(self) -> float:
        """``D`` of the product set, ``D^2 = sum D_l^2``; on rank-r balls ``D_l = 2 delta_l``."""
        return math.sqrt(sum((d * self.ball.diameter(self.sides[path])) ** 2 for path, d in self.delta.items()))

    def identity_error(self) -> float:
        """The distance of the three terms' sum from the average gap, which is rounding only.

        The curvature term is computed from the same losses and pairings, so this checks the arithmetic and not the
        measurements.
        """
        return abs(sum(self.terms.values()) - float(self.low.mean()))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        lists = ("loss", "low", "high", "error_low", "error_high", "alignment", "curvature", "distance2")
        return {
            "eta": self.eta,
            "ball": self.ball.name,
            "rank": self.ball.rank,
            "delta": self.delta,
            "D": self.diameter,
            **{name: getattr(self, name).tolist() for name in lists},
            "terms": self.terms,
            "identity_error": self.identity_error(),
            "per_layer": {path: gaps.tolist() for path, gaps in self.per_layer.items()},
            "other_parameters_moved": self.others_moved,
        }

    def table(self) -> str:
        """The links and the decomposition as text."""
        lines = [
            f"{'link':>4} {'loss':>8} {'gap g_t':>21} {'error eps_t':>21} {'alignment':>15} {'c_t':>10} {'|V-W|':>8}"
        ]
        for t in range(self.low.size):
            lines.append(
                f"{t:>4} {self.loss[t]:>8.4f} {_range(self.low[t], self.high[t]):>21}"
                f" {_range(self.error_low[t], self.error_high[t]):>21}"
                f" {self.alignment[t, 1]:>7.3f}..{self.alignment[t, 0]:<6.3f} {self.curvature[t]:>10.3g}"
                f" {math.sqrt(self.distance2[t]):>8.3g}"
            )
        terms = " + ".join(f"{value:.4g} ({name})" for name, value in self.terms.items())
        lines.append(f"after the last link: loss {self.loss[-1]:.4f}; eta = {self.eta:.4g}, D = {self.diameter:.4g}")
        lines.append(f"average gap {self.low.mean():.4g} = {terms}   [off by {self.identity_error():.1e}]")
        if self.others_moved:
            lines.append("note: training moved other parameters than the adapters too; c_t includes their effect")
        return "\n".join(lines)


def _range(low: float, high: float) -> str:
    return f"{low:.4g}..{high:.4g}"


def decompose(
    links: Sequence[Link],
    probes: Sequence[Probe],
    last_loss: float,
    eta: float,
    radius: Mapping[str, float],
    ball: Ball,
) -> Decomposition:
    """Decompose the average gap of a chain whose links are all measured.

    Args:
        links: the chain. probes: one per link, measured at its start.
        last_loss: the fixed loss after the last link, ``L_{T+1}``.
        eta: the step. radius: of K per layer, from `radii`. ball: the kind of K.
    """
    loss = np.array([*(probe.loss for probe in probes), last_loss])
    per_layer = {path: np.array([_gap(probe.layers[path], radius[path], ball) for probe in probes]) for path in radius}
    gaps = sum(per_layer.values())
    assert isinstance(gaps, np.ndarray)
    moved = np.array([sum(layer.moved for layer in probe.layers.values()) for probe in probes])
    errors = gaps + moved[:, None] / eta
    with np.errstate(divide="ignore", invalid="ignore"):
        alignment = 1 - errors / gaps
    return Decomposition(
        eta,
        dict(radius),
        ball,
        loss,
        gaps[:, 0],
        gaps[:, 1],
        errors[:, 0],
        errors[:, 1],
        alignment,
        2 * (np.diff(loss) - moved) / eta**2,
        np.array([sum(f.norm() ** 2 for f in link.factors.values()) for link in links]) / eta**2,
        per_layer,
        any(link.trained for link in links),
        {path: _side(links[0], path) for path in radius},
    )


def _side(link: Link, path: str) -> int:
    factor = link.factors[path]
    return min(factor.B.shape[0], factor.A.shape[1])


def radii(links: Sequence[Link], eta: float, delta: float | Mapping[str, float] | None, ball: Ball) -> dict[str, float]:
    """The radius of each layer's set, checked to contain every W_t and V_t.

    Args:
        links: the chain, with at least one link. eta: the step. ball: the kind of K.
        delta: the radius of all layers, or one per layer; None chooses the smallest.

    Raises:
        ValueError: ``delta`` is not positive, or too small for a W_t or V_t, so that a gap could be negative.
    """
    needed = {}
    for path in links[0].factors:
        sizes = []
        for t, link in enumerate(links):
            behind, (left, right) = stack(links[:t], path), factors(link, path)
            sizes.append(_size(behind, ball))
            scaled = (left / eta, right)
            sizes.append(_size(scaled if behind is None else _join(behind, scaled), ball))
        needed[path] = max(sizes)
    if delta is None:
        return needed
    chosen = {
        path: positive("delta", delta[path] if isinstance(delta, Mapping) else delta, "the radius of K")
        for path in needed
    }
    for path, radius in chosen.items():
        if radius < needed[path] * (1 - 1e-9):
            raise ValueError(
                f"delta must be at least {needed[path]:.6g} for layer {path!r}, got {radius:.6g}: a smaller set "
                "leaves W_t or V_t outside, and the gap could be negative; raise delta, or eta"
            )
    return chosen


def _gap(layer: LayerGap, delta: float, ball: Ball) -> tuple[float, float]:
    """Both ends of ``delta support(G) + <G, dW>``; on fresh batches one unbiased value."""
    if layer.scored is not None:
        value = delta * layer.scored + layer.pairing
        return value, value
    low, high = layer.strength(ball)
    return delta * low + layer.pairing, delta * high + layer.pairing


def factors(link: Link, path: str) -> LowRankPair:
    """A link's update of one layer in float64, ``s B`` and ``A``, less the product that it started at, if any."""
    triples = link.factors[path].triples()
    return torch.cat([s * B.double() for _, B, s in triples], dim=1), torch.cat([A.double() for A, _, _ in triples])


def _join(first: LowRankPair, second: LowRankPair) -> LowRankPair:
    return torch.cat([first[0], second[0]], dim=1), torch.cat([first[1], second[1]], dim=0)


def stack(links: Sequence[Link], path: str) -> LowRankPair | None:
    """The sum of the links' updates as one low-rank pair; None for no links."""
    if not links:
        return None
    pairs = [factors(link, path) for link in links]
    return torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs], dim=0)


def _size(pair: LowRankPair | None, ball: Ball) -> float:
    """The gauge of ``left @ right`` in the ball of radius 1, from QR decompositions of both factors."""
    if pair is None:
        return 0.0
    left, right = torch.linalg.qr(pair[0])[1], torch.linalg.qr(pair[1].T)[1]
    return ball.gauge(torch.linalg.svdvals(left @ right.T).cpu().numpy())
