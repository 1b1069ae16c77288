"""`Snapshots` makes links of any training run: the change of the layers' weights between two marks.

A chain needs no `ChainOptimizer`: full fine-tuning, Muon, or a method of one's own moves the weights too, and what it
moved between two marks is a link. So `theory.llm_gap.GapProbe` measures such runs as it measures chains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from cola import Chain, Factor, KnotReport, Link
from cola.lora.names import modules_by_name
from theory.real_run.sketch import weight_of


class Snapshots:
    """The links of a run that no `ChainOptimizer` drives.

    Args:
        model: the model that is trained. Its weights are copied at every mark.
        layers: paths of the layers whose weights belong to the links; by default all of ``nn.Linear``.

    Attributes:
        chain: the links so far, a `cola.Chain`.

    Raises:
        ValueError: the model has no such layer, or the layer has no weight with two axes.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> run = Snapshots(model)
        >>> with torch.no_grad():
        ...     _ = model[0].weight.add_(1.0)  # a step of training
        >>> round(run.mark().report.delta_norm, 3)
        2.449
    """

    def __init__(self, model: nn.Module, layers: Iterable[str] | None = None) -> None:
        modules = modules_by_name(model)
        chosen = [p for p, m in modules.items() if type(m) is nn.Linear] if layers is None else list(layers)
        if not chosen:
            raise ValueError("layers must name at least one layer, got none: the model has no nn.Linear")
        for path in chosen:
            weight = getattr(modules.get(path), "weight", None)
            if not isinstance(weight, Tensor) or weight.ndim != 2:
                raise ValueError(
                    f"layers must have a weight with two axes, got {path!r}: name layers such as nn.Linear"
                )
        self.layers = {path: modules[path] for path in chosen}
        self.chain = Chain()
        self._last = self._now()
        self._told: list[Callable[[KnotReport], None]] = []

    def _now(self) -> dict[str, Tensor]:
        return {path: weight_of(module).detach().clone() for path, module in self.layers.items()}

    def on_mark(self, tell: Callable[[KnotReport], None]) -> None:
        """Call a function with the report of each link from now on."""
        self._told.append(tell)

    def moved(self) -> bool:
        """Whether a weight has changed since the last mark."""
        return any(not torch.equal(self._last[path], weight_of(module)) for path, module in self.layers.items())

    @torch.no_grad()
    def mark(self, step: int = 0) -> Link:
        """End a link here: it is the change of the weights since the last mark.

        Args:
            step: the optimizer steps taken so far, for the link's report.
        """
        now = self._now()
        factors = {path: _factor(weight.double() - self._last[path].double()) for path, weight in now.items()}
        size = float(torch.tensor([factor.norm() for factor in factors.values()]).norm())
        rank = max(factor.rank for factor in factors.values())
        report = KnotReport(len(self.chain), step, rank, size, 0.0, None, 0.0)
        link = Link(len(self.chain), 0, factors, {}, report)
        self.chain = Chain([*self.chain, link])
        self._last = now
        for tell in self._told:
            tell(report)
        return link


def _factor(change: Tensor) -> Factor:
    """A dense change as a product with an identity on the smaller side."""
    out, inner = change.shape
    change = change.float()
    eye = torch.eye(min(out, inner), device=change.device)
    A, B = (eye, change) if inner <= out else (change, eye)
    return Factor(A, B, 1.0, "nearest")
