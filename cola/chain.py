"""The ledger of a chain: every link that was tied, as it was tied. It knows names and tensors, never optimizers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cola.adapters import adapted_class, refusal
from cola.adapters.targets import canonical, modules_by_name, unwrap
from cola.tie import KnotError, delta_norm, key, residual_like, tie_


@dataclass(frozen=True)
class LayerReport:
    """One layer's share of a knot (Frobenius norms).

    Attributes:
        delta_norm: ``‖s·B A‖``.
        lost_norm: the part of it that rounding lost.
        rounding: how the sum was rounded.
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
        rank: of the link.
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Link:
    """One tied link.

    Attributes:
        index: place in the chain, from 0.
        seed: of the run; the link's draws and its stochastic rounding follow from (seed, index, layer).
        factors: per layer path.
        trained: values, at the knot, of the parameters that were trained beside the adapters (biases,
            ``modules_to_save``), by path.
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


class Chain:
    """The tied links of a run, in order.

    Args:
        keep: False counts links without keeping their factors (a chain that nobody wants to export).

    >>> len(Chain())
    0
    """

    def __init__(self, *, keep: bool = True) -> None:
        self.keep = keep
        self.missing = 0  # links before the first one held: a state dict brings weights, not links
        self._links: list[Link] = []

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links)

    def __getitem__(self, index: int) -> Link:
        return self._links[index]

    def __repr__(self) -> str:
        return f"Chain({len(self)} links, ranks {[link.rank for link in self]})"

    def append(self, link: Link) -> None:
        """Record a link. Its index must be the next one."""
        if link.index != self.missing + len(self):
            raise ValueError(f"link {link.index} cannot follow link {self.missing + len(self) - 1}: links go in order")
        self._links.append(link if self.keep else Link(link.index, link.seed, {}, {}, link.report))

    def resume(self, index: int) -> None:
        """Go on before link ``index``: later links are dropped, and links that are not here are noted as missing."""
        if index >= self.missing:
            del self._links[index - self.missing :]
        else:
            self._links.clear()
        self.missing = index - len(self._links)

    def layers(self) -> list[str]:
        """Paths of all layers that any link changes."""
        return list(dict.fromkeys(path for link in self for path in link.factors))

    def apply(self, model: nn.Module, upto: int | None = None) -> None:
        """Tie the links into a fresh base, as the run did: same order, same rounding, hence the same bits.

        Args:
            model: the untouched base; changed in place.
            upto: only the first ``upto`` links; None for all.

        Raises:
            ValueError: a layer is missing, of another shape, or cannot be tied; nothing is changed then.
            RuntimeError: the links were not kept.
        """
        links = self._links[: self._count(upto)]
        self._require_kept()
        modules = modules_by_name(model)
        parameters = {canonical(path): p for path, p in unwrap(model).named_parameters()}
        for link in links:
            for path, factor in link.factors.items():
                _require_layer(path, factor, modules)
            for path, value in link.trained.items():
                if path not in parameters or parameters[path].shape != value.shape:
                    raise ValueError(f"the chain trained {path!r} {tuple(value.shape)}, which this model does not have")
        residuals: dict[str, Tensor] = {}
        with torch.no_grad():
            for link in links:
                for path, factor in link.factors.items():
                    tie_factor(modules[path], path, factor, link, residuals)
                for path, value in link.trained.items():
                    parameters[path].copy_(value)

    def undo(self) -> Link:
        """Take the last link off the ledger and return it.

        Weights are not touched: subtracting a link would leave rounding behind. Rebuild them exactly with `apply`
        on the base.
        """
        if not self._links:
            raise ValueError("an empty chain has no link to undo")
        return self._links.pop()

    def delta(self, layer: str) -> Tensor:
        """``Σ s B A`` of one layer in float64, out×in."""
        self._require_kept()
        found = [link.factors[layer] for link in self if layer in link.factors]
        if not found:
            raise ValueError(f"layer {layer!r} is not in the chain; it has {', '.join(self.layers()) or 'none'}")
        return torch.stack([factor.delta() for factor in found]).sum(0)

    def singular_values(self, layer: str) -> Tensor:
        """Singular values of ``Σ s B A`` in float64, largest first, from the factors alone (two QRs)."""
        self._require_kept()
        found = [link.factors[layer] for link in self if layer in link.factors]
        if not found:
            raise ValueError(f"layer {layer!r} is not in the chain; it has {', '.join(self.layers()) or 'none'}")
        left = torch.cat([f.scaling * f.B.double() for f in found], dim=1)
        right = torch.cat([f.A.double() for f in found], dim=0)
        return torch.linalg.svdvals(torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T)

    def effective_rank(self, tolerance: float | None = None) -> dict[str, int]:
        """Rank of each layer's total update.

        Args:
            tolerance: singular values up to this share of the largest count as zero; None for the precision of the fp32
                factors, ``eps·max(out, in)`` as in `torch.linalg.matrix_rank`.
        """
        ranks = {}
        for layer in self.layers():
            values = self.singular_values(layer)
            factor = next(link.factors[layer] for link in self if layer in link.factors)
            eps = torch.finfo(factor.A.dtype).eps * max(factor.A.shape[1], factor.B.shape[0])
            share = eps if tolerance is None else tolerance
            ranks[layer] = int((values > share * values[0]).sum()) if values[0] > 0 else 0
        return ranks

    def _count(self, upto: int | None) -> int:
        if upto is None:
            return len(self)
        if not 0 <= upto <= len(self):
            raise ValueError(f"upto={upto} is outside a chain of {len(self)} links")
        return upto

    def _require_kept(self) -> None:
        if self.missing:
            raise RuntimeError(
                f"the chain lacks its first {self.missing} links: it was resumed from a state dict, which holds the "
                "merged weights and not the links"
            )
        if not self.keep and len(self):
            raise RuntimeError("the links were not kept (keep_links=False): this needs a chain that keeps them")


def tie_factor(
    module: nn.Module,
    path: str,
    factor: Factor,
    link: Link,
    residuals: dict[str, Tensor],
    device: str | None = "cpu",
) -> None:
    """Tie one recorded factor into ``module``'s weight exactly as the run did."""
    kind = adapted_class(module)
    weight: Tensor = module.weight  # type: ignore[assignment]
    left, right = kind.factors(factor.A, factor.B)
    compensated = factor.rounding == "compensated"
    if compensated and path not in residuals:
        residuals[path] = residual_like(weight, device or weight.device)
    tie_(
        weight,
        left,
        right,
        factor.scaling,
        rounding=factor.rounding,
        seed=key(link.seed, link.index, path, "rounding"),
        residual=residuals[path] if compensated else None,
    )


def _require_layer(path: str, factor: Factor, modules: dict[str, nn.Module]) -> None:
    module = modules.get(path)
    if module is None:
        raise ValueError(f"the chain has a link on {path!r}, which this model does not have: is it the right base?")
    reason = refusal(module)
    if reason is not None:
        raise ValueError(f"the chain has a link on {path!r}, which {reason}")
    shape, wanted = adapted_class(module).shape(module), (factor.B.shape[0], factor.A.shape[1])
    if shape != wanted:
        raise ValueError(f"the chain's link on {path!r} is {wanted}, the layer is {shape}: is it the right base?")


__all__ = ["Chain", "Factor", "KnotError", "KnotReport", "LayerReport", "Link"]
