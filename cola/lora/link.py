"""Data classes that record one tied link: its factors in each layer, and the report of its knot."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cola.knot.tie import TIEABLE, Tie, delta_norm
from cola.lora.init import Pair
from cola.lora.layer import Triple


@dataclass(frozen=True)
class LayerReport:
    """One layer's share of a knot (Frobenius norms).

    Attributes:
        delta_norm: ``‖s·B A‖``.
        lost_norm: norm of the part lost to rounding; of a re-quantised layer the error of its codes for ``W₀ + ΣΔ``.
        rounding: how the sum was rounded; of a quantised layer ``"stack"`` or ``"requantize"``.
        weight_norm: ``‖W‖`` after the tie; None if it is not known, as in a chain made of an adapter.
    """

    delta_norm: float
    lost_norm: float
    rounding: str
    weight_norm: float | None = None

    @property
    def share(self) -> float:
        """``‖s·B A‖ / ‖W‖``; 0 if ``weight_norm`` is None or 0."""
        return self.delta_norm / self.weight_norm if self.weight_norm else 0.0


@dataclass(frozen=True)
class KnotReport:
    """Report of a knot.

    Attributes:
        index: index of the tied link, from 0.
        step: optimizer steps taken before the knot.
        rank: the link's rank, the largest where layers differ.
        delta_norm: ``‖ΔW‖`` over all layers (root of the sum of squares).
        lost_norm: norm of the part lost to rounding, over all layers.
        loss: the training loss of the step before the knot; None if none was seen.
        seconds: duration of the knot.
        layers: the norms of each layer.
    """

    index: int
    step: int
    rank: int
    delta_norm: float
    lost_norm: float
    loss: float | None
    seconds: float
    layers: Mapping[str, LayerReport] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The largest ``‖ΔW‖ / ‖W‖`` of a layer; 0 if none is known."""
        return max((layer.share for layer in self.layers.values()), default=0.0)

    @property
    def lost(self) -> float:
        """``lost_norm / delta_norm``; 0 if the link changed nothing."""
        return self.lost_norm / self.delta_norm if self.delta_norm else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The numbers by name, without the layers; None for a ``loss`` or ``share`` that is not known.

        >>> KnotReport(0, 100, 8, 2.0, 0.5, loss=None, seconds=0.1).to_dict()["lost"]
        0.25
        """
        known = any(layer.weight_norm for layer in self.layers.values())
        return {
            "index": self.index,
            "step": self.step,
            "rank": self.rank,
            "delta_norm": self.delta_norm,
            "share": self.share if known else None,
            "lost": self.lost,
            "loss": self.loss,
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        numbers = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.to_dict().items())
        return f"KnotReport({', '.join(numbers)}, layers={len(self.layers)})"

    def __str__(self) -> str:
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        share = f" (at most {per_cent(self.share)} of a layer's ‖W‖)" if self.share else ""
        # stochastic rounding loses nothing on average: the norm is that of its noise
        noise = bool(self.layers) and all(layer.rounding == "stochastic" for layer in self.layers.values())
        lost = f"{small_share(self.lost)} of it"
        lost = f"rounding noise {lost}" if noise else f"{lost} lost to rounding"
        return (
            f"knot {self.index} after step {self.step}: rank {self.rank}, ‖ΔW‖ {self.delta_norm:.4g}{share}, "
            f"{lost}{loss}, {self.seconds * 1000:.1f} ms"
        )


def per_cent(share: float | None) -> str | None:
    """A share in per cent, as text; None stays None.

    >>> per_cent(0.01234), per_cent(1.234)
    ('1.2 %', '123 %')
    """
    if share is None:
        return None
    value = 100 * share
    return f"{value:.0f} %" if 10 <= value < 1e4 else f"{value:.2g} %"


def small_share(share: float) -> str:
    """A share that is usually minute: in per cent from a thousandth on."""
    return f"{per_cent(share)}" if share >= 1e-3 else f"{share:.1e}"


def are_factors(A: Tensor, B: Tensor) -> bool:
    """Whether A and B are factors of a matrix, or of E of them."""
    fits = A.dim() == B.dim() in (2, 3) and A.shape[:-2] == B.shape[:-2] and A.shape[-2] == B.shape[-1]
    return fits and {A.dtype, B.dtype} <= set(TIEABLE)


def are_rows(indices: Tensor, values: Tensor) -> bool:
    """Whether these are `Rows`."""
    fits = indices.dtype == torch.int64 and indices.dim() == 1 and len(indices) > 0 and values.dim() == 2
    fits = fits and len(values) == len(indices) and values.dtype in TIEABLE
    return bool(fits and indices[0] >= 0 and (indices.diff() > 0).all())


def used_rank(A: Tensor, B: Tensor) -> int:
    """Rank of a link without its zero padding: the last row of A or column of B that is not zero, counted from 1."""
    used = (_ranks_used(A.mT) | _ranks_used(B)).nonzero()
    return int(used.max()) + 1 if len(used) else 0


def _ranks_used(factor: Tensor) -> Tensor:
    """Which of a factor's columns (…, r) are not zero."""
    return factor.ne(0).flatten(end_dim=-2).any(0)


@dataclass(frozen=True, eq=False)
class Factor:
    """A link's share of one layer.

    Attributes:
        A: r×in, B: out×r, as they were trained; E×r×in and E×out×r where one weight holds E matrices (fused experts).
        scaling: s.
        rounding: how the tie was rounded; on a quantised layer ``"stack"`` or ``"requantize"``.
        form: how the layer uses its weight, as in `LayerPrint`.
        start: (A₀, B₀) of a link that did not start at zero; ``s·B₀ A₀`` was subtracted from the weight at its start.

    The link adds ``ΔW = s·B A`` to the weight, or ``s·(B A − B₀ A₀)`` if it has a ``start``.
    """

    A: Tensor
    B: Tensor
    scaling: float
    rounding: str
    start: Pair | None = None
    form: str = "linear"

    def __repr__(self) -> str:
        sizes = "×".join(map(str, self.shape))
        start = "" if self.start is None else ", with a start"
        return f"Factor({sizes}, rank {self.rank}, s={self.scaling:g}, {self.rounding}{start})"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of ΔW, or (E, out, in)."""
        return *self.A.shape[:-2], self.B.shape[-2], self.A.shape[-1]

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[-2]

    def triples(self) -> list[Triple]:
        """(A, B, s) of all products that make up ΔW, in the order in which they are added to the weight."""
        own = self.A, self.B, self.scaling
        return [own] if self.start is None else [(*self.start, -self.scaling), own]

    def cpu(self) -> "Factor":
        """A copy on the CPU."""
        start = None if self.start is None else (self.start[0].cpu(), self.start[1].cpu())
        return replace(self, A=self.A.cpu(), B=self.B.cpu(), start=start)

    def norm(self) -> float:
        """``‖ΔW‖`` without forming ΔW."""
        if self.start is None:
            return delta_norm(self.B, self.A, self.scaling)
        left = torch.cat([B.double() * s for _, B, s in self.triples()], -1)
        return delta_norm(left, torch.cat([A.double() for A, _, _ in self.triples()], -2), 1.0)

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """ΔW as an out×in matrix, or E of them."""
        first, *rest = (s * (B.to(dtype) @ A.to(dtype)) for A, B, s in self.triples())
        return sum(rest, first)


def combined(ties: Sequence[Tie], factor: Factor) -> Tie:
    """One layer's tie of a whole link, from the ties of its products."""
    if len(ties) == 1:
        return ties[0]
    return replace(ties[-1], delta=factor.norm(), lost=math.hypot(*(tie.lost for tie in ties)))


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a weight that were trained whole.

    Attributes:
        indices: k of them, int64, increasing.
        values: k×n, as trained; the weight's dtype may be narrower.
    """

    indices: Tensor
    values: Tensor

    def __repr__(self) -> str:
        return f"Rows({len(self.indices)} of {self.values.shape[-1]})"


@dataclass(frozen=True, eq=False)
class Link:
    """One tied link.

    Attributes:
        index: place in the chain, from 0.
        seed: the run's; (seed, index, layer) decides the link's draws and its stochastic rounding.
        factors: the link's share of each layer, by path.
        trained: values at the knot of everything else that training changes, by path: the extra trained parameters
            (biases, ``modules_to_save``), a shared one under each of its paths, and the persistent buffers that differ
            from the base model's (running statistics).
        report: the knot's report.
        rows: values at the knot of the rows that ``trainable_token_indices`` trains, by the weight's name; those of a
            shared weight under each of its names.
    """

    index: int
    seed: int
    factors: Mapping[str, Factor]
    trained: Mapping[str, Tensor]
    report: KnotReport
    rows: Mapping[str, Rows] = field(default_factory=dict)

    def __repr__(self) -> str:
        count = len(self.report.layers)
        kept = "" if self.factors else ", factors not kept"
        layers = f"{count} layer{'' if count == 1 else 's'}"
        norm = f"‖ΔW‖ {self.report.delta_norm:.4g}"
        return f"Link({self.index}, step {self.step}, rank {self.rank} on {layers}, {norm}{kept})"

    @property
    def rank(self) -> int:
        """The link's rank."""
        return self.report.rank

    @property
    def step(self) -> int:
        """Optimizer steps taken before the knot."""
        return self.report.step
