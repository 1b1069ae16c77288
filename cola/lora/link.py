"""The record of one tied link: what it added to each layer, and what its knot reported. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cola.knot.tie import delta_norm


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
    """A link's share of one layer: ``ΔW = scaling·B A``, with A r×in and B out×r, on the CPU as they were trained."""

    A: Tensor
    B: Tensor
    scaling: float
    rounding: str

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]

    def norm(self) -> float:
        """``‖ΔW‖`` without forming ΔW."""
        return delta_norm(self.B, self.A, self.scaling)

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """ΔW, out×in, in full."""
        return self.scaling * (self.B.to(dtype) @ self.A.to(dtype))


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
