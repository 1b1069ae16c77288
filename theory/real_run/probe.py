"""`GapProbe` measures a chain link by link: it finds sigma_1 of each layer's gradient without forming it.

A measurement makes two passes over the batches. The first pass takes a sketch ``G Omega`` and finds the range Q;
the second takes ``Q'G``. If both use the same batches (a fixed loss), the result is an interval:
``sigma_1(Q'G) <= sigma_1(G)`` and ``sigma_1(G)^2 <= sigma_1(Q'G)^2 + |(I - QQ')G|^2``. The last norm is bounded
from columns ``(I - QQ') G omega`` that did not help to choose Q (Halko, Martinsson, Tropp, arXiv 0909.4061, lemma
4.1). The interval is certified for the gradient that the model computes; in bfloat16 it differs from the exact
gradient by about half a percent. If the second pass uses fresh batches, the vertex of the first pass is scored
without the upward bias of a maximum over noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cola import Chain, ChainOptimizer, KnotReport
from cola.lora.names import modules_by_name
from theory.arguments import count, positive
from theory.real_run.balls import Ball
from theory.real_run.decomposition import Decomposition, LayerGap, Probe, decompose, factors, radii, stack
from theory.real_run.sketch import Loss, LowRankPair, Tap, mean_loss, sweep, weight_of
from theory.real_run.snapshots import Snapshots
from theory.seeds import generator

FAILURE = 1e-6  # allowed probability, per layer and measurement, of an upper end that is too small


class GapProbe:
    """Measure the gap at the start of every link of a chain.

    With a running optimizer the probe measures each link when its knot is tied. For a finished chain, call
    `measure` with the index of a link. The probe writes no weights: ``W_t`` is the stored weight minus the links
    from t on, and these are added as low-rank terms during the measurement. The run does not change: no
    ``.grad``, no generator, no mode.

    Args:
        model: the model that the optimizer trains.
        opt: a `ChainOptimizer` (made with ``keep_links=True``), the `Chain` of a finished run, or the `Snapshots` of a
            run that no `ChainOptimizer` drives.
        batches: microbatches of the fixed loss, all with the same weight.
        loss: ``loss(model, batch)``, a scalar mean; by default ``model(**batch).loss``.
        fresh: other batches for the second pass; they give an estimate without upward bias, not an interval.
        sketch: number of columns for the range; as many, and at least 16, test it. With as many as a layer's smaller
            side its numbers are exact, and the spectral ball's interval is wide with fewer.
        rank: of the atoms of K, and the number of singular values to keep.
        ball: ``"rank"`` (rank 1: the trace ball), ``"capped"``, or ``"spectral"``, which keeps all singular values; see
            `theory.real_run.balls`.
        seed: of the sketches.

    Raises:
        TypeError: ``opt`` has another type.
        ValueError: there are no batches, or the chain does not keep its links.

    Example:
        >>> from cola import LinkConfig, StepKnots
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> link = LinkConfig(r=1, lora_alpha=1, target_modules="all-linear")
        >>> opt = ChainOptimizer(torch.optim.SGD, model, policy=StepKnots(every=2), link=link, lr=0.01)
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
        opt: ChainOptimizer | Chain | Snapshots,
        batches: Sequence[Any],
        loss: Loss | None = None,
        *,
        fresh: Sequence[Any] | None = None,
        sketch: int = 16,
        rank: int = 1,
        ball: str = "rank",
        seed: int = 0,
    ) -> None:
        if not isinstance(opt, (ChainOptimizer, Chain, Snapshots)):
            raise TypeError(f"opt={opt!r} must be a ChainOptimizer, the Chain of a finished run, or Snapshots")
        self.opt = opt
        if not self.chain.keep:
            raise ValueError("opt must keep its links: make the ChainOptimizer with keep_links=True")
        if not batches or (fresh is not None and not fresh):
            raise ValueError("batches must hold at least one microbatch, got none")
        self.model, self.batches, self.fresh = model, list(batches), fresh
        self.loss: Loss = loss if loss is not None else _model_loss
        self.ball = Ball(ball, rank)
        self.sketch = max(count("sketch", sketch, "the columns of the sketch"), rank)
        self.seed = seed
        self.probes: dict[int, Probe] = {}
        if isinstance(opt, ChainOptimizer) and not opt.finished:
            opt.on_knot(self._on_knot)
        elif isinstance(opt, Snapshots):
            opt.on_mark(self._on_knot)

    @property
    def chain(self) -> Chain:
        """The links of the run so far."""
        return self.opt if isinstance(self.opt, Chain) else self.opt.chain

    def _on_knot(self, report: KnotReport) -> None:
        self.measure(report.index)

    def measure(self, link: int) -> Probe:
        """Measure at the start of a tied link, in two passes over the batches.

        Args:
            link: index of a link of the chain, from 0.

        Raises:
            ValueError: the chain has no such link, or a run measured by `Snapshots` has gone on since its last mark.
        """
        self._whole()
        if self.chain.missing:
            raise ValueError(
                f"opt must hold its whole chain, and its first {self.chain.missing} links are missing (resumed from a "
                "state dict?): probe the run from its first link on"
            )
        if not 0 <= link < len(self.chain):
            raise ValueError(f"link must be one of the chain's {len(self.chain)} links, got {link}")
        layers = self._layers()
        sketches = {path: self._sketch(path, link) for path in layers}
        first = {path: self._tap(path, module, link) for path, module in layers.items()}
        for path, tap in first.items():
            tap.right = {"range": sketches[path].range, "test": sketches[path].test}
            tap.left = {"corange": sketches[path].corange}
        loss = sweep(self.model, layers, first, self.loss, self.batches)
        second = {}
        for path, tap in first.items():
            Q, vertex = _range_and_vertex(tap, sketches[path], self.ball)
            behind = stack(list(self.chain)[:link], path)
            pairs = {"scored": vertex} if behind is None else {"scored": vertex, "pairing": behind}
            second[path] = Tap(offset=tap.offset, left={"QG": Q}, pairs=_working(layers[path], pairs))
            tap.pairs = {}  # of full rank in a run that Snapshots recorded
        sweep(self.model, layers, second, self.loss, self.batches if self.fresh is None else self.fresh)
        found = {path: self._layer(first[path], second[path], sketches[path]) for path in layers}
        self.probes[link] = Probe(link, loss, found)
        return self.probes[link]

    def loss_now(self) -> float:
        """The fixed loss at the stored weights, without the live link."""
        self._whole()
        layers = self._layers()
        taps = {path: Tap(offset=self._begun(path)) for path in layers}
        return mean_loss(self.model, layers, taps, self.loss, self.batches)

    def decompose(
        self,
        *,
        eta: float | None = None,
        delta: float | Mapping[str, float] | None = None,
        rank: int | None = None,
        ball: str | None = None,
    ) -> Decomposition:
        """Decompose the average gap of the chain.

        Args:
            eta: the step, 1/T by default; ``V_t = W_t + B_t A_t / eta``.
            delta: radius of K, for all layers or per layer; by default the smallest that contains every W_t and V_t.
            rank: rank of the atoms of K, by default that of the probe; 1 is the trace ball.
            ball: ``"rank"``, ``"capped"`` or ``"spectral"``, by default that of the probe.

        Raises:
            ValueError: a link is not measured, a radius is too small for a W_t or V_t, or the probe has not kept the
                singular values that the ball needs.
        """
        T = len(self.chain)
        missing = [t for t in range(T) if t not in self.probes]
        if T == 0 or missing:
            raise ValueError(f"every link must be measured first, missing {missing or 'all'}: call measure(link)")
        own = self.ball
        chosen = Ball(own.name if ball is None else ball, own.rank if rank is None else rank)
        if self.fresh is not None and chosen != own:
            raise ValueError(
                f"rank and ball must be the probe's {own.rank} and {own.name!r} where it scored on fresh batches, got "
                f"{chosen.rank} and {chosen.name!r}"
            )
        if own.name != "spectral" and chosen.name == "spectral":
            raise ValueError("ball='spectral' needs all singular values: make GapProbe with ball='spectral'")
        if own.name != "spectral" and chosen.rank > own.rank:
            raise ValueError(
                f"rank must be at most the probe's {own.rank}, got {chosen.rank}: make GapProbe with rank={chosen.rank}"
            )
        eta = 1 / T if eta is None else positive("eta", eta, "the step that scales a link to a vertex")
        links = list(self.chain)
        radius = radii(links, eta, delta, chosen)
        return decompose(links, [self.probes[t] for t in range(T)], self.loss_now(), eta, radius, chosen)

    def _whole(self) -> None:
        """Refuse a run whose weights are no longer those of its last mark."""
        if isinstance(self.opt, Snapshots) and self.opt.moved():
            raise ValueError(
                "opt has trained on since its last mark: call its mark() first, so that the links are whole"
            )

    def _layers(self) -> dict[str, nn.Module]:
        modules = modules_by_name(self.model)
        return {path: modules[path] for path in self.chain[0].factors}

    def _tap(self, path: str, module: nn.Module, link: int) -> Tap:
        """The first pass's tap of one layer at W_t: its offset, and its pairing with the link."""
        links = list(self.chain)
        ahead, begun = stack(links[link:], path), self._begun(path)
        assert ahead is not None
        offset = (-ahead[0], ahead[1])
        if begun is not None:
            offset = torch.cat([offset[0], begun[0]], dim=1), torch.cat([offset[1], begun[1]])
        kept = _working(module, {"offset": offset, "moved": factors(links[link], path)})
        return Tap(offset=kept["offset"], pairs={"moved": kept["moved"]})

    def _begun(self, path: str) -> LowRankPair | None:
        """The product that the live link started at, which the stored weight lacks; None for a start at zero."""
        if not isinstance(self.opt, ChainOptimizer) or self.opt.finished:
            return None
        start = self.opt.live.starts.of.get(path)
        scaling = self.opt.live.layers[path].scaling
        return None if start is None else (scaling * start.B.double(), start.A.double())

    def _sketch(self, path: str, link: int) -> _Sketch:
        """Gaussian columns that depend on seed, link and layer only: the same in both passes and every process."""
        factor = self.chain[link].factors[path]
        m, n = factor.B.shape[0], factor.A.shape[1]
        layer = sorted(self.chain[link].factors).index(path)
        rng = generator(self.seed, link, layer)
        k = min(self.sketch, m, n)
        draws = [rng.standard_normal(shape) for shape in ((n, k), (n, max(16, self.sketch)), (m, min(2 * k, m)))]
        return _Sketch(*(torch.from_numpy(draw) for draw in draws))

    def _layer(self, first: Tap, second: Tap, sketch: _Sketch) -> LayerGap:
        QG, Q = second.sums["QG"].double(), second.left["QG"].double()
        side = min(Q.shape[0], QG.shape[1])
        sigma = tuple(torch.linalg.svdvals(QG)[: self.ball.kept(side)].tolist())
        pairing = float(second.sums["pairing"]) if "pairing" in second.sums else 0.0
        moved = float(first.sums["moved"])
        if self.fresh is not None:
            return LayerGap(sigma, math.inf, pairing, moved, float(second.sums["scored"]), side)
        if QG.shape[0] == side:
            return LayerGap(sigma, 0.0, pairing, moved, side=side)
        left_over = first.sums["test"].double() - Q @ (QG @ sketch.test.to(QG))
        # |B| <= a sqrt(2/pi) max_i |B w_i| fails with probability a^-r over r Gaussian columns
        a = FAILURE ** (-1 / sketch.test.shape[1])
        residual = a * math.sqrt(2 / math.pi) * float(left_over.norm(dim=0).max())
        return LayerGap(sigma, residual, pairing, moved, side=side)


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def _working(module: nn.Module, pairs: Mapping[str, LowRankPair]) -> dict[str, LowRankPair]:
    """Pairs in the precision in which a tap computes: float32, or float64 for a float64 layer."""
    exact = torch.float64 if weight_of(module).dtype == torch.float64 else torch.float32
    return {name: (left.to(exact), right.to(exact)) for name, (left, right) in pairs.items()}


@dataclass(frozen=True)
class _Sketch:
    """Gaussian matrices of one layer: ``range`` (in x k) and ``corange`` (out x 2k) to find Q, ``test`` (in x k)."""

    range: Tensor
    test: Tensor
    corange: Tensor


def _range_and_vertex(tap: Tap, sketch: _Sketch, ball: Ball) -> tuple[Tensor, LowRankPair]:
    """An orthonormal range of the sketch, and the best vertex direction after the first pass.

    The single-pass approximation of Tropp, Yurtsever, Udell and Cevher (arXiv 1609.00048) is ``G ~ Q X`` with
    ``X = (Psi'Q)^+ Psi'G``. The vertex has the leading singular directions of X, with the ball's singular values.
    """
    Q = torch.linalg.qr(tap.sums["range"].double())[0]
    X = torch.linalg.lstsq(sketch.corange.to(Q).T @ Q, tap.sums["corange"].double()).solution
    u, sigma, v = torch.linalg.svd(X, full_matrices=False)
    return Q, (Q @ u * ball.vertex_values(sigma), v)
