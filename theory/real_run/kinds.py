"""Kinds of links: trained by AdamW, or made of best vertices, from the same batches and with one tuned number each."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cola import ChainOptimizer, LinkConfig, LinkStart, NeverKnots
from theory.oracles.newton_schulz import COEFFICIENTS
from theory.real_run.balls import Ball
from theory.real_run.sketch import Loss, evaluating, weight_of

START_SHARE = 10
"""A tenth of a link's batches finds the gradient's directions for a link that starts in them."""


@dataclass
class Task:
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

    @property
    def ranks(self) -> list[int]:
        """The largest rank that each layer's weight can have; a sketch of so many columns finds all of its gradient."""
        return [min(weight_of(module).shape) for module in self.modules().values()]

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


class Kind(ABC):
    """One way to make a link: ``link(task, batches, size, seed)`` moves the weights once through the batches.

    Args:
        name: for tables. start: the first value that is tried for the tuned number.
    """

    def __init__(self, name: str, start: float) -> None:
        self.name, self.start = name, start

    @abstractmethod
    def link(self, task: Task, batches: Sequence[Any], size: float, seed: int) -> None:
        """Train or choose a link, and leave it in the weights."""


class OneVertex(Kind):
    """The link is one vertex for the mean gradient of all batches: Algorithm 2. ``size`` is its radius per layer."""

    def __init__(self, name: str, start: float, make: Vertices) -> None:
        super().__init__(name, start)
        self.make = make

    def link(self, task: Task, batches: Sequence[Any], size: float, seed: int) -> None:
        """Move once."""
        generator = torch.Generator().manual_seed(seed)
        task.move(self.make(task.gradient(batches), generator), size)


class ManyVertices(OneVertex):
    """The link is a step per batch along the vertex for an average of gradients, with a linearly falling size.

    With the spectral ball these are Muon's steps. ``size`` is the sum of all steps.
    """

    def link(self, task: Task, batches: Sequence[Any], size: float, seed: int) -> None:
        """Move once per batch."""
        generator, average = torch.Generator().manual_seed(seed), dict[str, Tensor]()
        total = sum(range(1, len(batches) + 1))
        for step, batch in enumerate(batches):
            fresh = task.gradient([batch])
            average = {p: 0.9 * average[p] + 0.1 * g for p, g in fresh.items()} if average else fresh
            task.move(self.make(average, generator), size * (len(batches) - step) / total)


class Trained(Kind):
    """The link is trained by AdamW, as in a chain; the rate falls linearly. ``size`` is the peak learning rate.

    Args:
        rank: of the link, whose scale is 1.
        in_gradient: start A in the top right singular directions of the gradient, found from a tenth of the batches.
    """

    def __init__(self, name: str, start: float, rank: int, in_gradient: bool = False) -> None:
        super().__init__(name, start)
        self.rank, self.in_gradient = rank, in_gradient

    def link(self, task: Task, batches: Sequence[Any], size: float, seed: int) -> None:
        """Train on the batches, one step each."""
        init: str | Callable[[LinkStart], Tensor] = "kaiming"
        if self.in_gradient:
            first = max(1, len(batches) // START_SHARE)
            init = _in_directions(task.gradient(batches[:first]))
            batches = batches[first:]
        config = LinkConfig(r=self.rank, lora_alpha=self.rank, target_modules=task.layers, init=init)
        optimizer = ChainOptimizer(
            torch.optim.AdamW, task.model, NeverKnots(), link=config, seed=seed, lr=size, weight_decay=0.0
        )
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = size * (1 - step / len(batches))
            loss = task.loss(task.model, batch)
            if not math.isfinite(float(loss.detach())):
                break  # the size is too large; the loss of the weights says so
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.finish()
        task.model.requires_grad_(False)


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
