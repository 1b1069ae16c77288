"""The record of one tied link: what it added to each layer, and what its knot reported. Plain data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cola.knot.tie import Tie, delta_norm
from cola.lora.init import Pair
from cola.lora.layer import Triple


@dataclass(frozen=True)
class LayerReport:
    """One layer's share of a knot (Frobenius norms).

    Attributes:
        delta_norm: ``‖s·B A‖``.
        lost_norm: the part of it that rounding lost; of a re-quantised layer what its codes miss of ``W₀ + ΣΔ``.
        rounding: how the sum was rounded; of a quantised layer ``"stack"`` or ``"requantize"``.
    """

    delta_norm: float
    lost_norm: float
    rounding: str


@dataclass(frozen=True)
class KnotReport:
    """What a knot did.

    Attributes:
        index: of the link that was tied, from 0.
        step: optimizer steps taken when it was tied.
        rank: of the link, the largest where layers differ.
        delta_norm: ``‖ΔW‖``, over all layers (root of the sum of squares).
        lost_norm: norm of the part that rounding lost, over all layers.
        loss: the training loss of the step before the knot; None if none was seen.
        seconds: the knot took.
        layers: the same norms per layer.
    """

    index: int
    step: int
    rank: int
    delta_norm: float
    lost_norm: float
    loss: float | None
    seconds: float
    layers: Mapping[str, LayerReport] = field(default_factory=dict)

    def __str__(self) -> str:
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        share = self.lost_norm / self.delta_norm if self.delta_norm else 0.0
        return (
            f"knot {self.index} after step {self.step}: rank {self.rank}, ‖ΔW‖ {self.delta_norm:.4g}, "
            f"{share:.1e} of it lost to rounding{loss}, {self.seconds * 1000:.1f} ms"
        )


def used_rank(A: Tensor, B: Tensor) -> int:
    """Rank of a link without the zeros that pad it: r×in A and out×r B, cut after the last part that is not zero."""
    used = (A.ne(0).any(1) | B.ne(0).any(0)).nonzero()
    return int(used.max()) + 1 if len(used) else 0


@dataclass(frozen=True, eq=False)
class Factor:
    """A link's share of one layer.

    Attributes:
        A: r×in, B: out×r, as they were trained.
        scaling: s.
        rounding: how the tie was rounded or, on a quantised layer, what was done instead.
        start: (A₀, B₀) of a link that did not start at zero; the weight gave back ``s·B₀ A₀`` when the link began.

    The link adds ``ΔW = s·B A`` to the weight, or ``s·(B A − B₀ A₀)`` if it has a ``start``.
    """

    A: Tensor
    B: Tensor
    scaling: float
    rounding: str
    start: Pair | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]

    def given_back(self) -> Triple:
        """What the weight gives back when the link begins, as (A, B, s)."""
        assert self.start is not None
        return *self.start, -self.scaling

    def triples(self) -> list[Triple]:
        """(A, B, s) of all products that make up ΔW, in the order in which the weight takes them."""
        own = self.A, self.B, self.scaling
        return [own] if self.start is None else [self.given_back(), own]

    def cpu(self) -> "Factor":
        """The same on the CPU."""
        start = None if self.start is None else (self.start[0].cpu(), self.start[1].cpu())
        return replace(self, A=self.A.cpu(), B=self.B.cpu(), start=start)

    def norm(self) -> float:
        """``‖ΔW‖`` without forming ΔW."""
        if self.start is None:
            return delta_norm(self.B, self.A, self.scaling)
        left = torch.cat([B.double() * s for _, B, s in self.triples()], 1)
        return delta_norm(left, torch.cat([A.double() for A, _, _ in self.triples()]), 1.0)

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """ΔW, out×in, in full."""
        first, *rest = (s * (B.to(dtype) @ A.to(dtype)) for A, B, s in self.triples())
        return sum(rest, first)


def combined(ties: Sequence[Tie], factor: Factor) -> Tie:
    """What a whole link did to a layer, from the ties of its products."""
    if len(ties) == 1:
        return ties[0]
    return replace(ties[-1], delta=factor.norm(), lost=math.hypot(*(tie.lost for tie in ties)))


@dataclass(frozen=True, eq=False)
class Link:
    """One tied link.

    Attributes:
        index: place in the chain, from 0.
        seed: of the run; the link's draws and its stochastic rounding follow from (seed, index, layer).
        factors: per layer path.
        trained: values, at the knot, of what else training has moved, by path: the parameters that were trained beside
            the adapters (biases, ``modules_to_save``), one that several modules share under each of its paths; and
            persistent buffers that are no longer the base's (running statistics).
        report: what the knot reported.
    """

    index: int
    seed: int
    factors: Mapping[str, Factor]
    trained: Mapping[str, Tensor]
    report: KnotReport

    @property
    def rank(self) -> int:
        """The link's rank."""
        return self.report.rank

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was tied."""
        return self.report.step
