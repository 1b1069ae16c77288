"""The Frank-Wolfe gap of a real fine-tuning run, link by link: ``GapProbe`` and ``python -m theory.llm_gap``.

A chain is Algorithm 2 with ``V_t = W_t + B_t A_t / eta``: the link that training found, in place of the
best vertex of K. Per layer ``g = delta sigma_1(G) + <G, dW>`` with ``G`` the gradient at the frozen weight
and ``dW`` the sum of the links so far; gaps of layers add up over the product set. delta is a choice and
sigma_1 a fact, so both are reported.

A probe of a link costs two passes over its batches. The first draws a sketch ``G Omega`` and finds the
range Q; the second reads ``Q'G``. On the same batches (a fixed loss) that gives an interval,
certified for the gradient as the model's arithmetic
computes it and not for the exact one (in bfloat16 they differ by near half a percent):
``sigma_1(Q'G) <= sigma_1(G)``, and ``sigma_1(G)^2 <= sigma_1(Q'G)^2 + |(I - QQ')G|^2`` with the last norm
bounded from columns ``(I - QQ') G omega`` that took no part in choosing Q (Halko, Martinsson, Tropp, arXiv
0909.4061, lemma 4.1). On fresh batches the vertex of the first pass is scored without the upward bias of a
maximum over noise.

The exact decomposition of a chain's average gap, whatever the training did: ``avg g = (L_1 - L_{T+1})/(eta T) +
(eta/2) avg c + avg eps``: loss drop, curvature met, oracle error. Chains are short, so the theorem's bound says
nothing about them; the decomposition always does.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cola import Chain, ChainOptimizer, KnotReport, Link
from cola.adapters.targets import modules_by_name
from theory.arguments import count, positive
from theory.llm_sketch import Loss, LowRankPair, Tap, mean_loss, sweep
from theory.matrix_oracles import support_norm

FAILURE = 1e-6  # allowed probability, per layer and probe, that the upper end of an interval is too small


@dataclass(frozen=True)
class LayerGap:
    """One layer at the start of one link.

    Attributes:
        sigma: leading singular values of ``Q'G``, each at most that of the gradient.
        residual: bound on ``|(I - QQ')G|`` in the spectral norm; 0 for an exact range, infinite on fresh
            batches.
        pairing: ``<G, dW_t>``. moved: ``<G, B_t A_t>``, negative where the link descends.
        scored: ``u'Gv`` of the first pass's vertex on fresh batches, or None.
    """

    sigma: tuple[float, ...]
    residual: float
    pairing: float
    moved: float
    scored: float | None = None

    def strength(self, rank: int) -> tuple[float, float]:
        """The interval for ``(sum_{i<=rank} sigma_i^2)^(1/2)``; ``sigma_1`` for rank 1, the trace ball."""
        low2 = float(np.sum(np.square(self.sigma[:rank])))
        rounding = 1 + 64 * float(np.finfo(np.float32).eps)
        return math.sqrt(low2), math.sqrt(low2 + rank * self.residual**2) * rounding


@dataclass(frozen=True)
class Probe:
    """The measurements at the start ``W_t`` of link t, before any choice of delta and eta."""

    link: int
    loss: float
    layers: Mapping[str, LayerGap]


@dataclass
class Decomposition:
    """A chain's gaps and where they went; arrays have one entry per link.

    Attributes:
        eta: the step. delta: radius per layer. rank: of the atoms of K (1: the trace ball).
        loss: (T+1,) ``L_1 .. L_{T+1}``. low, high: the interval of ``g_t``.
        error_low, error_high: of ``eps_t = g_t + <G, B_t A_t>/eta``. alignment: ``rho_t = 1 - eps_t/g_t``,
        both ends.
        curvature: ``c_t``. distance2: ``|V_t - W_t|^2``.
        per_layer: path -> (T, 2) interval of the layer's gap.
        beside: whether parameters beside the adapters moved too; their effect is then inside ``c_t``.
    """

    eta: float
    delta: dict[str, float]
    rank: int
    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error_low: np.ndarray
    error_high: np.ndarray
    alignment: np.ndarray
    curvature: np.ndarray
    distance2: np.ndarray
    per_layer: dict[str, np.ndarray] = field(repr=False, default_factory=dict)
    beside: bool = False

    @property
    def terms(self) -> dict[str, float]:
        """The three terms of the average gap (its lower end), which sum to it."""
        T = self.low.size
        return {
            "loss drop": float(self.loss[0] - self.loss[-1]) / (self.eta * T),
            "curvature": self.eta / 2 * float(self.curvature.mean()),
            "oracle error": float(self.error_low.mean()),
        }

    @property
    def diameter(self) -> float:
        """``D`` of the product set, ``D^2 = sum 4 delta_l^2``."""
        return math.sqrt(sum(4 * d * d for d in self.delta.values()))

    def identity_error(self) -> float:
        """How far the three terms are from the average gap; rounding only.

        The curvature term is defined from the same losses and pairings, so this checks the bookkeeping and not the
        measurements.
        """
        return abs(sum(self.terms.values()) - float(self.low.mean()))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        lists = ("loss", "low", "high", "error_low", "error_high", "alignment", "curvature", "distance2")
        return {
            "eta": self.eta,
            "rank": self.rank,
            "delta": self.delta,
            "D": self.diameter,
            **{name: getattr(self, name).tolist() for name in lists},
            "terms": self.terms,
            "identity_error": self.identity_error(),
            "per_layer": {path: gaps.tolist() for path, gaps in self.per_layer.items()},
            "other_parameters_moved": self.beside,
        }

    def table(self) -> str:
        """The links, and the decomposition, as text."""
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
        if self.beside:
            lines.append("note: parameters beside the adapters moved too; their effect is inside c_t")
        return "\n".join(lines)


def _range(low: float, high: float) -> str:
    return f"{low:.4g}..{high:.4g}"


class GapProbe:
    """Measure the gap at the start of every link of a chain.

    With a running optimizer, the probe measures each link as its knot is tied; for a finished chain call
    `measure` with the index of a link. Weights are never written: the state ``W_t`` is the stored weight
    less the links from t on, added as low-rank terms while measuring. Nothing of the run changes: no
    ``.grad``, no generator, no mode.

    Args:
        model: the model that the optimizer trains.
        opt: a `ChainOptimizer` (made with ``keep_links=True``), or the `Chain` of a finished run.
        batches: microbatches of the fixed loss, weighted alike.
        loss: ``loss(model, batch)``, a scalar mean; by default ``model(**batch).loss``.
        fresh: other batches for the second pass, for an estimate without upward bias in place of an interval.
        sketch: columns for the range; as many, and at least 16, only test it. rank: singular values to keep.
        seed: of the sketches.

    Raises:
        TypeError: ``opt`` is neither; ValueError: no batches, or links that are not kept.

    Example:
        >>> from cola import LinkConfig, StepKnots
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> link = LinkConfig(r=1, lora_alpha=1, target_modules="all-linear")
        >>> opt = ChainOptimizer(torch.optim.SGD, model, StepKnots(every=2), link=link, lr=0.01)
        >>> probe = GapProbe(model, opt, [torch.ones(2, 4)], loss=lambda m, x: m(x).square().mean())
        >>> for _ in range(4):
        ...     opt.zero_grad()
        ...     model(torch.ones(2, 4)).square().mean().backward()
        ...     _ = opt.step()
        >>> _ = opt.finish()
        >>> probe.decompose().identity_error() < 1e-6
        True
    """

    def __init__(
        self,
        model: nn.Module,
        opt: ChainOptimizer | Chain,
        batches: Sequence[Any],
        loss: Loss | None = None,
        *,
        fresh: Sequence[Any] | None = None,
        sketch: int = 16,
        rank: int = 1,
        seed: int = 0,
    ) -> None:
        if not isinstance(opt, (ChainOptimizer, Chain)):
            raise TypeError(f"opt={opt!r} must be a ChainOptimizer or the Chain of a finished run")
        self.chain = opt.chain if isinstance(opt, ChainOptimizer) else opt
        if not self.chain.keep:
            raise ValueError("opt must keep its links: make the ChainOptimizer with keep_links=True")
        if not batches or (fresh is not None and not fresh):
            raise ValueError("batches must hold at least one microbatch, got none")
        self.model, self.batches, self.fresh = model, list(batches), fresh
        self.loss: Loss = loss if loss is not None else _model_loss
        self.rank = count("rank", rank, "the number of singular values to keep")
        self.sketch = max(count("sketch", sketch, "the columns of the sketch"), self.rank)
        self.seed = seed
        self.probes: dict[int, Probe] = {}
        if isinstance(opt, ChainOptimizer):
            opt.on_knot(self._on_knot)

    def _on_knot(self, report: KnotReport) -> None:
        self.measure(report.index)

    def measure(self, link: int) -> Probe:
        """Measure at the start of a tied link; two passes over the batches.

        Args:
            link: index of a link of the chain, from 0.

        Raises:
            ValueError: the chain has no such link.
        """
        if self.chain.missing:
            raise ValueError(
                f"opt must hold its whole chain, and its first {self.chain.missing} links are missing (resumed from a "
                "state dict?): probe the run from its first link on"
            )
        if not 0 <= link < len(self.chain):
            raise ValueError(f"link must be one of the chain's {len(self.chain)} links, got {link}")
        layers = self._layers()
        sketches = {path: self._sketch(path, link) for path in layers}
        first = {path: self._tap(path, link) for path in layers}
        for path, tap in first.items():
            tap.right = {"range": sketches[path].range, "test": sketches[path].test}
            tap.left = {"corange": sketches[path].corange}
        loss = sweep(self.model, layers, first, self.loss, self.batches)
        second = {path: self._tap(path, link) for path in layers}
        for path, tap in second.items():
            Q, vertex = _range_and_vertex(first[path], sketches[path], self.rank)
            tap.left = {"QG": Q}
            tap.pairs = {**tap.pairs, "scored": vertex}
        sweep(self.model, layers, second, self.loss, self.batches if self.fresh is None else self.fresh)
        found = {path: self._layer(first[path], second[path], sketches[path]) for path in layers}
        self.probes[link] = Probe(link, loss, found)
        return self.probes[link]

    def loss_now(self) -> float:
        """The fixed loss at the weights as they are stored, without a live link."""
        layers = self._layers()
        return mean_loss(self.model, layers, {path: Tap() for path in layers}, self.loss, self.batches)

    def decompose(
        self, *, eta: float | None = None, delta: float | Mapping[str, float] | None = None, rank: int | None = None
    ) -> Decomposition:
        """Decompose the average gap of the measured chain.

        Args:
            eta: the step, 1/T by default; ``V_t = W_t + B_t A_t / eta``.
            delta: radius of K, for all layers or per layer; by default the smallest that holds every W_t
                and V_t.
            rank: rank of the atoms of K; 1, the default, is the trace ball.

        Raises:
            ValueError: a link was not measured, or a radius leaves a W_t or V_t outside (the gap could be
                negative).
        """
        T = len(self.chain)
        missing = [t for t in range(T) if t not in self.probes]
        if T == 0 or missing:
            raise ValueError(f"every link must be measured first, missing {missing or 'all'}: call measure(link)")
        rank = self.rank if rank is None else count("rank", rank, "the rank of the atoms of K")
        if self.fresh is not None and rank != self.rank:
            raise ValueError(f"rank must be the probe's {self.rank} where it scored on fresh batches, got {rank}")
        if rank > self.rank:
            raise ValueError(
                f"rank must be at most the probe's {self.rank}, got {rank}: make GapProbe with rank={rank}"
            )
        eta = 1 / T if eta is None else positive("eta", eta, "the step that scales a link to a vertex")
        radius = self._radii(eta, delta, rank)
        probes = [self.probes[t] for t in range(T)]
        loss = np.array([probe.loss for probe in probes] + [self.loss_now()])
        per_layer = {
            path: np.array([_gap(probe.layers[path], radius[path], rank) for probe in probes]) for path in radius
        }
        gaps = sum(per_layer.values())
        assert isinstance(gaps, np.ndarray)
        moved = np.array([sum(layer.moved for layer in probe.layers.values()) for probe in probes])
        errors = gaps + moved[:, None] / eta
        with np.errstate(divide="ignore", invalid="ignore"):
            alignment = 1 - errors / gaps
        return Decomposition(
            eta,
            radius,
            rank,
            loss,
            gaps[:, 0],
            gaps[:, 1],
            errors[:, 0],
            errors[:, 1],
            alignment,
            2 * (np.diff(loss) - moved) / eta**2,
            np.array([sum(f.norm() ** 2 for f in link.factors.values()) for link in self.chain]) / eta**2,
            per_layer,
            any(link.trained for link in self.chain),
        )

    # inside

    def _layers(self) -> dict[str, nn.Module]:
        modules = modules_by_name(self.model)
        return {path: modules[path] for path in self.chain[0].factors}

    def _tap(self, path: str, link: int) -> Tap:
        """Offset and pairings of one layer at W_t."""
        links = list(self.chain)
        ahead, behind = _stack(links[link:], path), _stack(links[:link], path)
        assert ahead is not None
        pairs = {"moved": _factors(links[link], path)}
        if behind is not None:
            pairs["pairing"] = behind
        return Tap(offset=(-ahead[0], ahead[1]), pairs=pairs)

    def _sketch(self, path: str, link: int) -> _Sketch:
        """Gaussian columns, keyed by (seed, link, layer): the same for both passes and in every process."""
        factor = self.chain[link].factors[path]
        m, n = factor.B.shape[0], factor.A.shape[1]
        layer = sorted(self.chain[link].factors).index(path)
        rng = np.random.default_rng([self.seed, link, layer])
        k = min(self.sketch, m, n)
        draws = [rng.standard_normal(shape) for shape in ((n, k), (n, max(16, self.sketch)), (m, min(2 * k, m)))]
        return _Sketch(*(torch.from_numpy(draw) for draw in draws))

    def _layer(self, first: Tap, second: Tap, sketch: _Sketch) -> LayerGap:
        QG, Q = second.sums["QG"].double(), second.left["QG"].double()
        sigma = tuple(torch.linalg.svdvals(QG)[: self.rank].tolist())
        pairing = float(second.sums["pairing"]) if "pairing" in second.sums else 0.0
        moved = float(first.sums["moved"])
        if self.fresh is not None:
            return LayerGap(sigma, math.inf, pairing, moved, float(second.sums["scored"]))
        if QG.shape[0] == min(Q.shape[0], QG.shape[1]):
            return LayerGap(sigma, 0.0, pairing, moved)
        left_over = first.sums["test"].double() - Q @ (QG @ sketch.test.to(QG))
        # |B| <= a sqrt(2/pi) max_i |B w_i| fails with probability a^-r over r Gaussian columns
        a = FAILURE ** (-1 / sketch.test.shape[1])
        residual = a * math.sqrt(2 / math.pi) * float(left_over.norm(dim=0).max())
        return LayerGap(sigma, residual, pairing, moved)

    def _radii(self, eta: float, delta: float | Mapping[str, float] | None, rank: int) -> dict[str, float]:
        """The radius of each layer's set; checked to hold every W_t and V_t."""
        links, needed = list(self.chain), {}
        for path in self._layers():
            sizes = []
            for t, link in enumerate(links):
                behind, (left, right) = _stack(links[:t], path), _factors(link, path)
                sizes.append(_size(behind, rank))
                scaled = (left / eta, right)
                sizes.append(_size(scaled if behind is None else _join(behind, scaled), rank))
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


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def _gap(layer: LayerGap, delta: float, rank: int) -> tuple[float, float]:
    """``delta (sum sigma_i^2)^(1/2) + <G, dW>``, both ends; one unbiased value on fresh batches."""
    if layer.scored is not None:
        value = delta * layer.scored + layer.pairing
        return value, value
    low, high = layer.strength(rank)
    return delta * low + layer.pairing, delta * high + layer.pairing


def _factors(link: Link, path: str) -> LowRankPair:
    factor = link.factors[path]
    return factor.scaling * factor.B.double(), factor.A.double()


def _join(first: LowRankPair, second: LowRankPair) -> LowRankPair:
    return torch.cat([first[0], second[0]], dim=1), torch.cat([first[1], second[1]], dim=0)


def _stack(links: Sequence[Link], path: str) -> LowRankPair | None:
    """The sum of the links' updates as one low-rank pair; None for no links."""
    if not links:
        return None
    pairs = [_factors(link, path) for link in links]
    return torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs], dim=0)


def _size(pair: LowRankPair | None, rank: int) -> float:
    """The gauge of ``left @ right`` in the unit rank-r ball, from two QR decompositions of the factors."""
    if pair is None:
        return 0.0
    left, right = torch.linalg.qr(pair[0])[1], torch.linalg.qr(pair[1].T)[1]
    return support_norm(torch.linalg.svdvals(left @ right.T).numpy(), rank)


@dataclass(frozen=True)
class _Sketch:
    """Gaussian matrices for one layer: ``range`` (in x k) and ``corange`` (out x 2k) find, ``test`` (in x k) judges."""

    range: Tensor
    test: Tensor
    corange: Tensor


def _range_and_vertex(tap: Tap, sketch: _Sketch, rank: int) -> tuple[Tensor, LowRankPair]:
    """An orthonormal range of the sketch, and the best vertex direction that the first pass alone can tell.

    With ``G ~ Q X`` and ``X = (Psi'Q)^+ Psi'G``, the single-pass approximation of Tropp, Yurtsever, Udell
    and Cevher (arXiv 1609.00048), the vertex has the leading singular directions of X, weighted by their
    singular values to norm 1.
    """
    Q = torch.linalg.qr(tap.sums["range"].double())[0]
    X = torch.linalg.lstsq(sketch.corange.to(Q).T @ Q, tap.sums["corange"].double()).solution
    u, sigma, v = torch.linalg.svd(X, full_matrices=False)
    size = sigma[:rank].norm()
    weights = sigma[:rank] / size if size > 0 else torch.eye(1, rank, dtype=sigma.dtype)[0]
    return Q, (Q @ u[:, :rank] * weights, v[:rank])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m theory.llm_gap",
        description="Train the demo's chain and show the Frank-Wolfe gap of every link with its exact decomposition.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    out.add_argument(
        "--model", choices=("demo", "random"), default="demo", help="tiny OPT on prose, or a random network"
    )
    out.add_argument("--arm", help="arm of the demo: its policy, rank and learning rate (default: cola-3)")
    out.add_argument("--epochs", type=int, default=3, metavar="N", help="passes over the training text")
    out.add_argument("--lr", type=float, help="peak learning rate (default: the arm's recorded one)")
    out.add_argument("--eta", type=float, help="step that scales a link to a vertex (default: 1/T)")
    out.add_argument("--delta", type=float, help="radius of K per layer (default: the smallest that holds the run)")
    out.add_argument("--rank", type=int, default=1, metavar="R", help="rank of the atoms of K; 1 is the trace ball")
    out.add_argument("--probe-batches", type=int, default=4, metavar="N", help="microbatches of the fixed loss")
    out.add_argument("--sketch", type=int, default=32, metavar="K", help="columns of the gradient sketch")
    out.add_argument("--fresh", action="store_true", help="score on other batches: unbiased, in place of an interval")
    out.add_argument("--seed", type=int, default=0, metavar="N", help="of training, data and sketches")
    out.add_argument("--out", type=Path, default=Path("runs/llm_gap"), metavar="DIR", help="results and pictures")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if the decomposition holds to rounding, 1 if not, 2 for a bad argument."""
    options = parser().parse_args(arguments)
    from theory import llm_demo, llm_plots

    try:
        count("--epochs", options.epochs, "passes over the training text")
        count("--probe-batches", options.probe_batches, "microbatches of the fixed loss")
        count("--seed", options.seed, "the seed of training, data and sketches", least=0)
        for name in ("lr", "eta", "delta"):
            if getattr(options, name) is not None:
                positive(f"--{name}", getattr(options, name), "a positive number, or leave it out")
        if options.model == "random" and options.arm is not None:
            raise ValueError("--arm names an arm of the demo: leave it out with --model random")
        options.arm = "cola-3" if options.arm is None else options.arm
        run = llm_demo.train(options)
        result = run.probe.decompose(eta=options.eta, delta=options.delta)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(result.table())
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"kind": "link", "link": t, "loss": probe.loss, "layers": _layers_as_dict(probe)})
        for t, probe in sorted(run.probe.probes.items())
    ]
    lines.append(json.dumps({"kind": "chain", "model": options.model, "seed": options.seed, **result.as_dict()}))
    (options.out / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    picture = llm_plots.chain_gap(result, run.probe.probes, options.out / "chain_gap.png")
    print(f"results: {options.out / 'results.jsonl'}\npicture: {picture}")
    # the identity is algebra on recorded float64 numbers: a few of their units in the last place
    tolerance = 1e-12 * max(1.0, float(np.abs(result.loss).max()) / (result.eta * len(result.low)))
    if result.identity_error() > tolerance:
        print(f"FAIL the decomposition is off by {result.identity_error():.3g}, above rounding ({tolerance:.3g})")
        return 1
    return 0


def _layers_as_dict(probe: Probe) -> dict[str, dict[str, Any]]:
    return {
        path: {
            "sigma": list(layer.sigma),
            "residual": layer.residual if math.isfinite(layer.residual) else None,
            "pairing": layer.pairing,
            "moved": layer.moved,
            "scored": layer.scored,
        }
        for path, layer in probe.layers.items()
    }


if __name__ == "__main__":
    sys.exit(main())
