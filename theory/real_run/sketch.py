"""Linear functionals of a frozen layer's gradient, accumulated without ever forming the gradient.

For ``y = W x`` with a loss L, the gradient of L at W is ``G = sum_i dy_i x_i'`` over tokens i. Every
``G Omega``, ``Psi' G`` and ``<G, P>`` with a low-rank P is a sum over tokens too, so hooks can add them up
over microbatches and keep no more than a few columns. The base weights need no ``requires_grad``: a scalar
zero is added to the layer's output and the loss is differentiated with respect to those scalars alone, so
that no parameter's ``.grad`` is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LowRankPair = tuple[Tensor, Tensor]
"""``(left, right)``, out x q and q x in: the matrix ``left @ right``."""

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Tap:
    """What to add up for one layer, and the sums.

    Attributes:
        offset: added to the stored weight while measuring; None for nothing.
        right: name -> in x k, sums ``G Omega``. left: name -> out x k, sums ``Psi' G``.
        pairs: name -> low-rank P, sums ``<G, P>``.
        sums: name -> the sums, float32 (float64 for a float64 model).
    """

    offset: LowRankPair | None = None
    right: Mapping[str, Tensor] = field(default_factory=dict)
    left: Mapping[str, Tensor] = field(default_factory=dict)
    pairs: Mapping[str, LowRankPair] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, x: Tensor, dy: Tensor) -> None:
        """Add one call of the layer: x (..., in), dy (..., out)."""
        exact = torch.float64 if dy.dtype == torch.float64 else torch.float32
        x, dy = x.reshape(-1, x.shape[-1]).to(exact), dy.reshape(-1, dy.shape[-1]).to(exact)
        for name, omega in self.right.items():
            self._sum(name, dy.T @ (x @ omega.to(x)))
        for name, psi in self.left.items():
            self._sum(name, (dy @ psi.to(x)).T @ x)
        for name, (left, right) in self.pairs.items():
            self._sum(name, torch.sum((dy @ left.to(x)) * (x @ right.to(x).T)))

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def weight_of(module: nn.Module) -> Tensor:
    """A layer's stored weight as out x in, whichever way it is stored."""
    transposed = getattr(module, "transposed", not isinstance(module, nn.Linear))
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if transposed else weight


@contextmanager
def _tapped(layers: Mapping[str, nn.Module], taps: Mapping[str, Tap], anchors: list[Tensor] | None) -> Iterator[None]:
    """Hooks under which each layer computes with its stored weight plus the offset, without a live link.

    With ``anchors``, a scalar zero per call is added to the output and collected, and the output's
    gradient is tapped.
    """

    def hook_for(tap: Tap) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            bias: Tensor | None = module.bias  # type: ignore[assignment]
            out = F.linear(x, weight_of(module), bias)
            if tap.offset is not None:
                left, right = tap.offset
                exact = torch.float64 if x.dtype == torch.float64 else torch.float32
                x_exact = x.to(exact)
                term = F.linear(F.linear(x_exact, right.to(x_exact)), left.to(x_exact))
                out = (out.to(exact) + term).to(out.dtype)
            if anchors is None:
                return out
            anchor = torch.zeros((), dtype=out.dtype, device=out.device, requires_grad=True)
            anchors.append(anchor)
            out = out + anchor
            out.register_hook(partial(tap.add, x.detach()))
            return out

        return hook

    handles = [layers[path].register_forward_hook(hook_for(tap)) for path, tap in taps.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _same_draws() -> Iterator[None]:
    """Whatever a loss draws is the same in every pass, and the caller's generators stand as before afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode (dropout off, one fixed loss), each module's own mode restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def sweep(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    taps: Mapping[str, Tap],
    loss: Loss,
    batches: Sequence[Any],
) -> float:
    """One forward and backward pass over the microbatches; fills the taps and returns the mean loss.

    Args:
        model: in any mode; measured in evaluation mode. layers: path -> adapted or plain layer. taps: per
            path.
        loss: ``loss(model, batch)``, a scalar mean. batches: weighted alike.

    Raises:
        ValueError: the loss does not depend on any of the layers, or is not finite.
    """
    total = 0.0
    with evaluating(model), _same_draws(), torch.enable_grad():
        for batch in batches:
            anchors: list[Tensor] = []
            with _tapped(layers, taps, anchors):
                value = loss(model, batch)
            total += _finite(value) / len(batches)
            if not anchors:
                raise ValueError(f"loss must run the layers {sorted(layers)[:3]}..., but called none of them")
            torch.autograd.grad(value / len(batches), anchors, allow_unused=True)
    return total


@torch.no_grad()
def mean_loss(
    model: nn.Module, layers: Mapping[str, nn.Module], taps: Mapping[str, Tap], loss: Loss, batches: Iterable[Any]
) -> float:
    """The mean loss at the stored weights plus the taps' offsets, one forward pass."""
    values = []
    with evaluating(model), _same_draws(), _tapped(layers, taps, None):
        for batch in batches:
            values.append(_finite(loss(model, batch)))
    return math.fsum(values) / len(values)


def _finite(value: Tensor) -> float:
    if value.ndim != 0 or not torch.isfinite(value):
        raise ValueError(f"loss must return a finite scalar, got {value!r}: check loss(model, batch) on this batch")
    return float(value.detach())
