"""A second measurement of a probed chain, by dense gradients and by differences of the loss.

The probe's decomposition is an identity of its own numbers, so it holds for wrong ones too. Here a copy of the model
gets the weights ``W_t``, without hooks. The gap of one layer is computed from its dense gradient, and
``<G, B_t A_t>`` of all layers from differences of the loss along the link.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cola.lora.names import modules_by_name
from theory.checks.check import Check, at_most, vacuous
from theory.real_run.decomposition import Decomposition, factors, stack
from theory.real_run.probe import GapProbe
from theory.real_run.sketch import evaluating, weight_of
from theory.seeds import generator

# parts of a link: small, but large enough for the rounding of the loss
PARTS = (1 / 32, 1 / 16, 1 / 8)


@dataclass
class _Twin:
    """A copy of a probe's model, which can be put at ``W_t + part B_t A_t``."""

    probe: GapProbe

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.probe.model)
        modules = modules_by_name(self.model)
        self.weights = {path: weight_of(modules[path]) for path in self.probe.chain[0].factors}
        self.stored = {path: weight.detach().double() for path, weight in self.weights.items()}

    @torch.no_grad()
    def move(self, link: int, part: float = 0.0) -> None:
        """Set the weights; each is rounded once."""
        links = list(self.probe.chain)
        for path, weight in self.weights.items():
            ahead = stack(links[link:], path)
            assert ahead is not None
            left, right = factors(links[link], path)
            weight.copy_(self.stored[path] - ahead[0] @ ahead[1] + part * (left @ right))

    def loss(self, batches: Any, read: Callable[[Tensor], Any] = Tensor.item) -> list[Any]:
        """What ``read`` makes of the loss of each batch, in evaluation mode and with the draws of the probe."""
        with evaluating(self.model), torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            return [read(self.probe.loss(self.model, batch)) for batch in batches]

    def gradient(self, path: str, batches: Any) -> Tensor:
        """The dense gradient of one layer, out x in in float64."""
        weight, parameter = self.weights[path], modules_by_name(self.model)[path].weight
        assert isinstance(parameter, nn.Parameter)
        parameter.requires_grad_(True)
        parts = self.loss(batches, lambda loss: torch.autograd.grad(loss, parameter)[0].double() / len(batches))
        parameter.requires_grad_(False)
        total = torch.stack(parts).sum(dim=0)
        return total if weight is parameter else total.t()


def recheck(probe: GapProbe, result: Decomposition) -> list[Check]:
    """Measure every link a second time, without hooks.

    Args:
        probe: of a finished chain, with every link measured. result: its decomposition.

    Returns:
        Two checks per link. The gap of one layer, drawn at random, equals that of its dense gradient. And
        ``<G, B_t A_t>`` equals the slope of the loss along the link.
    """
    twin, out = _Twin(probe), []
    for t in range(len(probe.chain)):
        twin.move(t)
        path = str(generator(probe.seed, t, 1 << 20).choice(sorted(twin.weights)))
        out += [_gap(twin, result, t, path), _slope(twin, t)]
    return out


def _gap(twin: _Twin, result: Decomposition, t: int, path: str) -> Check:
    """The interval of a layer's gap contains the value of the dense gradient; on fresh batches it is at most that."""
    probe, layer = twin.probe, twin.probe.probes[t].layers[path]
    G = twin.gradient(path, probe.batches if probe.fresh is None else probe.fresh)
    behind = stack(list(probe.chain)[:t], path)
    pairing = 0.0 if behind is None else float(torch.sum(G * (behind[0] @ behind[1])))
    sigma = torch.linalg.svdvals(G).numpy()
    support = result.delta[path] * result.ball.support(sigma, 0.0, sigma.size)[0]
    exact, (low, high) = support + pairing, result.per_layer[path][t]
    off = max(low - exact, abs(layer.pairing - pairing), exact - high if probe.fresh is None else -np.inf)
    # sums over tokens in the precision of the model
    size = support + result.delta[path] * float(G.norm())
    tolerance = 1e3 * _unit(twin) * size
    detail = f"{path}: {low:.6g} to {high:.6g}, from the dense gradient {exact:.6g}"
    return at_most(f"gap = dense gradient's (link {t})", off, 0.0, tolerance, detail=detail)


def _slope(twin: _Twin, t: int) -> Check:
    """``<G, B_t A_t>`` summed over the layers is the central difference of the loss along the link.

    A network with ReLUs has kinks along a link, so the error of a difference has no known order. It is allowed three
    times the spread of the differences over parts up to four times as long.
    """
    probe, name = twin.probe, f"<G, BA> = slope of the loss (link {t})"

    def difference(part: float) -> float:
        ends = []
        for sign in (1, -1):
            twin.move(t, sign * part)
            ends.append(float(np.mean(twin.loss(probe.batches))))
        return (ends[0] - ends[1]) / (2 * part)

    slopes = [difference(part) for part in PARTS]
    slope, moved = slopes[0], [layer.moved for layer in probe.probes[t].layers.values()]
    rounding = 8 * _unit(twin) * (abs(probe.probes[t].loss) / PARTS[0] + 128 * float(np.sum(np.abs(moved))))
    tolerance = 3 * (max(slopes) - min(slopes)) + rounding
    if tolerance >= abs(slope):
        return vacuous(name, f"the slope {slope:.3g} is below rounding, {tolerance:.3g}", measured=abs(sum(moved)))
    return at_most(name, abs(sum(moved) - slope), 0.0, tolerance, detail=f"{sum(moved):.6g}, from losses {slope:.6g}")


def _unit(twin: _Twin) -> float:
    """The unit roundoff of the model's weights."""
    return max(float(torch.finfo(weight.dtype).eps) for weight in twin.weights.values())
