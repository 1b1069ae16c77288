"""Products with a frozen layer's gradient, summed over microbatches; the gradient itself is never formed.

For ``y = W x`` the gradient of the loss at W is ``G = sum_i dy_i x_i'`` over tokens i. The products ``G Omega``,
``Psi' G`` and ``<G, P>`` with a low-rank P are sums over tokens too, so hooks can add them up in a few columns.
The base weights need no ``requires_grad``: each layer's output gets a scalar zero added, and the loss is
differentiated with respect to those scalars alone. No parameter's ``.grad`` changes.
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
    """The products to sum for one layer, and their sums.

    Attributes:
        offset: added to the stored weight during a measurement, or None.
        right: name -> Omega, in x k, for ``G Omega``. left: name -> Psi, out x k, for ``Psi' G``.
        pairs: name -> low-rank P, for ``<G, P>``.
        sums: name -> the sum, in float32 (float64 for a float64 model).
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
    """A layer's weight as out x in, even if it is stored transposed."""
    transposed = getattr(module, "transposed", not isinstance(module, nn.Linear))
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if transposed else weight


@contextmanager
def _tapped(layers: Mapping[str, nn.Module], taps: Mapping[str, Tap], anchors: list[Tensor] | None) -> Iterator[None]:
    """Hooks that make each layer use its stored weight plus the offset, without the live link.

    If ``anchors`` is a list, each call adds a scalar zero to the output and to that list, and the tap reads the
    output's gradient.
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
    """Give every pass the same random draws, and restore the caller's generators afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and restore the mode of each module afterwards."""
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
    """Fill the taps in one forward and backward pass over the microbatches, and return the mean loss.

    Args:
        model: measured in evaluation mode. layers: path -> adapted or plain layer. taps: path -> tap.
        loss: ``loss(model, batch)``, a scalar mean. batches: all with the same weight.

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
                raise ValueError(f"loss must run the layers {sorted(layers)[:3]}..., but it called none of them")
            torch.autograd.grad(value / len(batches), anchors, allow_unused=True)
    return total


@torch.no_grad()
def mean_loss(
    model: nn.Module, layers: Mapping[str, nn.Module], taps: Mapping[str, Tap], loss: Loss, batches: Iterable[Any]
) -> float:
    """The mean loss at the stored weights plus the taps' offsets, in one forward pass."""
    values = []
    with evaluating(model), _same_draws(), _tapped(layers, taps, None):
        for batch in batches:
            values.append(_finite(loss(model, batch)))
    return math.fsum(values) / len(values)


def _finite(value: Tensor) -> float:
    if value.ndim != 0 or not torch.isfinite(value):
        raise ValueError(f"loss must return a finite scalar, got {value!r}: check loss(model, batch) on this batch")
    return float(value.detach())
