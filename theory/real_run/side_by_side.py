"""Links of several kinds from the same weights, at equal budgets: how well they are aligned, and what they gain.

Theorem 4.1 takes a link for a vertex of K that is nearly the best one. Here the best vertices themselves are tied, with
trained links next to them. Every kind of link reads the same batches, one gradient each, and has one number that is
tuned: a learning rate, or the size of the vertex. Then the same fixed loss measures every link, as `GapProbe` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cola import ChainOptimizer, KnotError, LinkConfig, LinkStart, NeverKnots
from theory.checks.significance import student
from theory.oracles.newton_schulz import COEFFICIENTS
from theory.real_run.balls import Ball
from theory.real_run.probe import GapProbe
from theory.real_run.sketch import Loss, evaluating, weight_of
from theory.real_run.snapshots import Snapshots

START_SHARE = 10
"""A tenth of a link's batches finds the gradient's directions for a link that starts in them."""

CONFIDENCE = 0.95


@dataclass
class Ground:
    """What all kinds share: the model, its loss and its text.

    Attributes:
        model: in the state where every run starts; a run changes it, and `restored` puts it back.
        layers: paths of the layers that links change.
        loss: ``loss(model, batch)``, a scalar mean.
        batches: seed -> an endless stream of training batches.
        fixed: held-out batches of the loss that measures every link.
        tuning: other held-out batches, on which the one number of each kind is chosen.
    """

    model: nn.Module
    layers: list[str]
    loss: Loss
    batches: Callable[[int], Iterator[Any]]
    fixed: Sequence[Any]
    tuning: Sequence[Any]
    _start: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._start = {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def restored(self) -> nn.Module:
        """The model, back at the start."""
        self.model.load_state_dict(self._start)
        return self.model.requires_grad_(False).eval()

    def modules(self) -> dict[str, nn.Module]:
        """The layers by path."""
        return {path: self.model.get_submodule(path) for path in self.layers}

    @torch.no_grad()
    def mean_loss(self, batches: Sequence[Any]) -> float:
        """The mean loss over batches, in evaluation mode."""
        with evaluating(self.model):
            return math.fsum(float(self.loss(self.model, batch)) for batch in batches) / len(batches)

    def gradient(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        """The mean gradient at the layers' weights, out x in, one pass over the batches."""
        modules = self.modules()
        parameters: list[Tensor] = [module.weight for module in modules.values()]  # type: ignore[misc]
        sums = [torch.zeros_like(weight.requires_grad_(True)) for weight in parameters]
        for batch in batches:
            grads = torch.autograd.grad(self.loss(self.model, batch) / len(batches), parameters)
            for total, grad in zip(sums, grads):
                total += grad
        self.model.requires_grad_(False)
        # a layer that stores its weight transposed
        return {path: g if weight_of(m) is m.weight else g.t() for (path, m), g in zip(modules.items(), sums)}

    @torch.no_grad()
    def move(self, changes: Mapping[str, Tensor], size: float) -> None:
        """Add ``size`` times a change to each layer's weight."""
        for path, module in self.modules().items():
            weight_of(module).add_(changes[path].to(weight_of(module)), alpha=size)


Vertices = Callable[[dict[str, Tensor], torch.Generator], dict[str, Tensor]]


def vertices(ball: Ball) -> Vertices:
    """The best vertex of a ball of radius 1 in every layer."""

    def best(gradient: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        out = {}
        for path, G in gradient.items():
            u, sigma, v = torch.linalg.svd(G, full_matrices=False)
            out[path] = -(u * ball.vertex_values(sigma)) @ v
        return out

    return best


def random_vertices(rank: int) -> Vertices:
    """Vertices of the capped ball in random directions; in each layer the sign that descends."""

    def drawn(gradient: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        out = {}
        for path, G in gradient.items():
            sides = [torch.randn(n, min(rank, *G.shape), generator=generator).to(G) for n in G.shape]
            V = torch.linalg.qr(sides[0])[0] @ torch.linalg.qr(sides[1])[0].T
            out[path] = V if float((V * G).sum()) <= 0 else -V
        return out

    return drawn


def newton_schulz_vertices() -> Vertices:
    """Muon's vertices: the polar factor by five Newton-Schulz steps."""

    def approximate(gradient: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        return {path: -_newton_schulz(G) for path, G in gradient.items()}

    return approximate


def _newton_schulz(G: Tensor) -> Tensor:
    """`theory.oracles.newton_schulz` on a tensor."""
    wide = G.shape[0] <= G.shape[1]
    X = (G if wide else G.T) / G.norm().clamp(min=1e-30)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        gram = X @ X.T
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X if wide else X.T


class Kind:
    """One way to make a link: ``link(ground, batches, size, seed)`` moves the weights once through the batches.

    Args:
        name: for tables. start: the first value that is tried for the tuned number.
    """

    def __init__(self, name: str, start: float) -> None:
        self.name, self.start = name, start

    def link(self, ground: Ground, batches: Sequence[Any], size: float, seed: int) -> None:
        """Train or choose a link, and leave it in the weights."""
        raise NotImplementedError


class OneVertex(Kind):
    """The link is one vertex for the mean gradient of all batches: Algorithm 2. ``size`` is its radius per layer."""

    def __init__(self, name: str, start: float, make: Vertices) -> None:
        super().__init__(name, start)
        self.make = make

    def link(self, ground: Ground, batches: Sequence[Any], size: float, seed: int) -> None:
        """Move once."""
        generator = torch.Generator().manual_seed(seed)
        ground.move(self.make(ground.gradient(batches), generator), size)


class ManyVertices(OneVertex):
    """The link is a step per batch towards a vertex for an average of gradients, with a linearly falling size.

    With the spectral ball these are Muon's steps. ``size`` is the sum of all steps.
    """

    def link(self, ground: Ground, batches: Sequence[Any], size: float, seed: int) -> None:
        """Move once per batch."""
        generator, average = torch.Generator().manual_seed(seed), dict[str, Tensor]()
        total = sum(range(1, len(batches) + 1))
        for step, batch in enumerate(batches):
            fresh = ground.gradient([batch])
            average = {p: 0.9 * average[p] + 0.1 * g for p, g in fresh.items()} if average else fresh
            ground.move(self.make(average, generator), size * (len(batches) - step) / total)


class Trained(Kind):
    """The link is trained by AdamW, as in a chain; the rate falls linearly. ``size`` is the peak learning rate.

    Args:
        rank: of the link, whose scale is 1.
        in_gradient: start A in the top right singular directions of the gradient, found from a tenth of the batches.
    """

    def __init__(self, name: str, start: float, rank: int, in_gradient: bool = False) -> None:
        super().__init__(name, start)
        self.rank, self.in_gradient = rank, in_gradient

    def link(self, ground: Ground, batches: Sequence[Any], size: float, seed: int) -> None:
        """Train on the batches, one step each."""
        init: str | Callable[[LinkStart], Tensor] = "kaiming"
        if self.in_gradient:
            first = max(1, len(batches) // START_SHARE)
            init = _in_directions(ground.gradient(batches[:first]))
            batches = batches[first:]
        config = LinkConfig(r=self.rank, lora_alpha=self.rank, target_modules=ground.layers, init=init)
        optimizer = ChainOptimizer(
            torch.optim.AdamW, ground.model, NeverKnots(), link=config, seed=seed, lr=size, weight_decay=0.0
        )
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = size * (1 - step / len(batches))
            loss = ground.loss(ground.model, batch)
            if not math.isfinite(float(loss.detach())):
                break  # the size is too large; the loss of the weights says so
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.finish()
        ground.model.requires_grad_(False)


def _in_directions(gradient: dict[str, Tensor]) -> Callable[[LinkStart], Tensor]:
    """An init in the gradient's top right singular directions, with rows as long as those of ``"kaiming"``."""

    def init(start: LinkStart) -> Tensor:
        v = torch.linalg.svd(gradient[start.path], full_matrices=False)[2][: start.rank]
        padded = torch.zeros(start.rank, start.shape[1])
        padded[: len(v)] = v / math.sqrt(3)
        return padded

    return init


def kinds(rank: int) -> list[Kind]:
    """The kinds that ``python -m theory.links`` compares, with links of a rank."""
    return [
        Trained("AdamW", 8e-3, rank),
        Trained("AdamW, in the gradient", 8e-3, rank, in_gradient=True),
        OneVertex("trace ball's vertex", 0.5, vertices(Ball("rank", 1))),
        OneVertex(f"capped vertex, r = {rank}", 0.25, vertices(Ball("capped", rank))),
        OneVertex("spectral vertex", 0.06, vertices(Ball("spectral"))),
        OneVertex(f"random vertex, r = {rank}", 0.06, random_vertices(rank)),
        ManyVertices("trace vertices, one a step", 2.0, vertices(Ball("rank", 1))),
        ManyVertices("Muon, a vertex a step", 0.5, newton_schulz_vertices()),
    ]


@dataclass(frozen=True)
class Measured:
    """A run of links of one kind: arrays have one entry per link, in nats.

    Attributes:
        kind: its name. seed: of its data and draws. size: the tuned number.
        loss: (T+1,) the fixed loss before each link, and after the last.
        best: the first-order gain of the best vertex of the trace ball around ``W_t`` with the link's trace norms.
        spectral_best: the same for the spectral ball with the link's largest singular values, NaN where the sketch does
            not find all of G.
        promised: the link's own, ``-<G, B A>``.
        terms: of the run's average gap, as in `Decomposition`. off: error of their sum, in units of rounding.
    """

    kind: str
    seed: int
    size: float
    loss: np.ndarray
    best: np.ndarray
    spectral_best: np.ndarray
    promised: np.ndarray
    terms: dict[str, float]
    off: float

    @property
    def drop(self) -> np.ndarray:
        """``L_t - L_{t+1}``."""
        return self.loss[:-1] - self.loss[1:]

    @property
    def curvature(self) -> np.ndarray:
        """What curvature took from the promise, ``eta^2 c_t / 2``."""
        return self.promised - self.drop

    @property
    def error(self) -> np.ndarray:
        """What the link promises less than the best vertex, ``eta eps_t``."""
        return self.best - self.promised

    @property
    def alignment(self) -> np.ndarray:
        """``rho_t``, the promised share of the best vertex's gain: 1 for that vertex."""
        return _share(self.promised, self.best)

    @property
    def spectral_alignment(self) -> np.ndarray:
        """The same share on the spectral ball: 1 for the polar factor."""
        return _share(self.promised, self.spectral_best)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        arrays = ("loss", "best", "promised", "error", "curvature", "drop", "alignment", "spectral_alignment")
        lists = {name: [x if math.isfinite(x) else None for x in getattr(self, name).tolist()] for name in arrays}
        return {**{name: getattr(self, name) for name in ("kind", "seed", "size", "terms")}, **lists}


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The quotient; NaN for a link that is zero."""
    return np.divide(part, whole, out=np.full_like(part, math.nan), where=whole > 0)


@dataclass(frozen=True)
class Budget:
    """What every kind may spend: links, and batches per link. ``sketch`` is the probe's, for `GapProbe`."""

    links: int
    steps: int
    sketch: int = 64


def run_links(
    ground: Ground, kind: Kind, size: float, budget: Budget, seed: int, probed: bool = True
) -> Measured | None:
    """Tie links of one kind one after the other, from the start, and measure each.

    Args:
        ground, kind, size, budget: of the run. seed: of its batches and draws. probed: whether to measure.
    """
    model = ground.restored()
    stream, record = ground.batches(seed), Snapshots(model, ground.layers)
    options: dict[str, Any] = {"sketch": budget.sketch, "ball": "spectral", "seed": seed}
    probe = GapProbe(model, record, ground.fixed, ground.loss, **options) if probed else None
    for index in range(budget.links):
        kind.link(ground, [next(stream) for _ in range(budget.steps)], size, 1000 * seed + index)
        record.mark((index + 1) * budget.steps)
    if probe is None:
        return None
    result = probe.decompose(ball="rank", rank=1)
    best, spectral, promised = np.zeros((3, budget.links))
    for t, link in enumerate(record.chain):
        for path, layer in probe.probes[t].layers.items():
            sigma = torch.linalg.svdvals(link.factors[path].delta())
            best[t] += float(sigma.sum()) * layer.sigma[0]
            spectral[t] += float(sigma[0]) * sum(layer.sigma) if layer.residual == 0 else math.nan
            promised[t] -= layer.moved
    rounding = np.finfo(float).eps * max(1.0, float(np.abs(result.loss).max()) / (result.eta * budget.links))
    off = result.identity_error() / rounding
    return Measured(kind.name, seed, size, result.loss, best, spectral, promised, result.terms, off)


def tuned(ground: Ground, kind: Kind, budget: Budget, seed: int, tries: int = 12) -> float:
    """The size of a kind: from its start by factors of two to an inner optimum of the loss on the tuning batches.

    Args:
        ground, kind, budget: of the runs. seed: of the tuning runs, none of the measured ones.
        tries: most moves to a better size.
    """
    found: dict[int, float] = {}

    def loss_at(power: int) -> float:
        if power not in found:
            try:
                run_links(ground, kind, kind.start * 2.0**power, budget, seed, probed=False)
                value = ground.mean_loss(ground.tuning)
            except KnotError:  # a link that is not finite cannot be tied
                value = math.inf
            found[power] = value if math.isfinite(value) else math.inf
        return found[power]

    at = 0
    for _ in range(tries):
        best = min((at, at - 1, at + 1), key=loss_at)
        if best == at:
            break
        at = best
    return kind.start * 2.0**at


#: the columns of the two blocks of `table`: heading -> value of a run, in nats where it is a loss
LOSSES: dict[str, Callable[[Measured], float]] = {
    "loss after": lambda run: float(run.loss[-1]),
    "alignment": lambda run: float(run.alignment.mean()),
    "on the spectral ball": lambda run: float(run.spectral_alignment.mean()),
}
ACCOUNT: dict[str, Callable[[Measured], float]] = {
    "best vertex": lambda run: float(run.best.mean()),
    "error": lambda run: float(run.error.mean()),
    "promise": lambda run: float(run.promised.mean()),
    "curvature": lambda run: float(run.curvature.mean()),
    "drop": lambda run: float(run.drop.mean()),
}


def table(runs: Sequence[Measured], untouched: float) -> str:
    """Two blocks of one row per kind: the losses and alignments, and the account of a link. Intervals are over seeds.

    Args:
        runs: every kind with the same seeds. untouched: the fixed loss before the first link.
    """
    by_kind: dict[str, list[Measured]] = {}
    for run in runs:
        by_kind.setdefault(run.kind, []).append(run)
    first = next(iter(by_kind))
    reference = [run.loss[-1] for run in by_kind[first]]
    width = max(len(name) for name in by_kind)
    blocks = []
    for head, columns in (("link", LOSSES), ("nats per link", ACCOUNT)):
        titles = [f"{title:>20}" for title in columns]
        if head == "link":
            titles = [f"{'size':>8}", titles[0], f"{'below ' + first:>20}", *titles[1:]]
        lines = [f"{head:{width}} " + " ".join(titles)]
        lines.append("-" * len(lines[0]))
        for name, group in by_kind.items():
            cells = [f"{_interval([value(run) for run in group]):>20}" for value in columns.values()]
            if head == "link":
                gains = [other - run.loss[-1] for other, run in zip(reference, group)]
                cells = [f"{group[0].size:>8.3g}", cells[0], f"{_interval(gains):>20}", *cells[1:]]
            lines.append(f"{name:{width}} " + " ".join(cells))
        blocks.append("\n".join(lines))
    note = (
        f"loss before: {untouched:.3f}; {CONFIDENCE:.0%} intervals over {len(reference)} seeds; alignments and nats are"
        " means over links\nbest vertex - error = promise, promise - curvature = drop"
    )
    return "\n\n".join([*blocks, note])


def _interval(samples: Sequence[float]) -> str:
    mean, half = student(samples, 1 - CONFIDENCE)
    return f"{mean:.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")
