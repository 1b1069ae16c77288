"""Links that start at a product ``s·B₀ A₀``: the weights give it back, so that the model computes the same."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cola.common.distributed import copy_whole
from cola.knot.tie import KnotError
from cola.lora import quantized
from cola.lora.init import Pair
from cola.lora.link import Factor
from cola.lora.peft import PeftLayer


@dataclass(frozen=True)
class Start:
    """The factors that a link of one layer began with, and the norm that rounding lost in subtracting their product."""

    A: Tensor
    B: Tensor
    lost: float


class Starts:
    """The products that the live link started at. Only ``init="two-sided"`` and functions make one.

    Until training begins, copies of the first link's untouched weights are kept: a failure, `ChainOptimizer.load` and
    `ChainOptimizer.follow` need them to the bit.

    Args:
        live: the `LiveLink`.

    Attributes:
        of: the starts by layer; layers whose link started at zero are not in it.
    """

    def __init__(self, live: Any) -> None:
        self.live = live
        self.of: dict[str, Start] = {}
        self._untouched: dict[str, dict[str, Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self.of)

    def clear(self) -> None:
        """The link has been tied."""
        self.of, self._untouched = {}, {}

    @torch.no_grad()
    def check(self, link: Mapping[str, Factor], index: int) -> None:
        """Raise KnotError if ``link`` starts at a product that a weight could not give back.

        It gives it back after the live link's tie, unless ``link`` is the live one itself.
        """
        for path, factor in link.items() if self.live.config._draws_pairs else ():
            layer, now = self.live.layers[path], self.live.factor(path)
            links = [(factor.A, factor.B, -factor.scaling)]
            if index != self.live.index:
                links.insert(0, (now.A, now.B, now.scaling))
            reason = layer.kind.obstacle(layer.holder, links, self.live.originals.get(path))
            if reason is not None:
                raise KnotError(f"link {index} cannot start: without its s·BA, layer {path!r} {reason}")

    def are_drawn(self) -> bool:
        """Whether the init has just drawn a first link that changes the model's function."""
        if not self.live.config._draws_pairs or any(isinstance(x, PeftLayer) for x in self.live.layers.values()):
            return False
        return any(f.A.any() and f.B.any() for f in map(self.live.factor, self.live.layers))

    def give_back(self, starts: Mapping[str, Pair] | None = None) -> None:
        """Subtract ``s·B A`` of a link that has just begun from the weights, so that the model computes the same.

        Args:
            starts: first A and B of each layer, None for the present ones; layers with a zero product may be missing.
        """
        if starts is None:
            link = self.live.snapshot() if self.live.config._draws_pairs else {}
            starts = {path: (factor.A, factor.B) for path, factor in link.items()}
        self.of = {}
        for path, (A, B) in starts.items():
            if A.any() and B.any():
                A, B = (factor.to(self.live.layers[path].lora_A.device) for factor in (A, B))
                done = self.live.add(path, (A, B, -self.live.layers[path].scaling), self.live.index, "start")
                self.of[path] = Start(A, B, done.lost)

    def give_back_first(self) -> None:
        """`give_back` for the first link; keeps copies of the weights until `forget_untouched`."""
        self.check({path: self.live.factor(path) for path in self.live.layers}, self.live.index)
        self._untouched = {path: _values(layer) for path, layer in self.live.layers.items()}
        self.give_back()
        self._untouched = {path: self._untouched[path] for path in self.of}

    def lack_copies(self) -> bool:
        """Whether the weights have given back a product, and no copies of the untouched ones are left."""
        return bool(self.of) and not self._untouched

    def forget_untouched(self) -> None:
        """Drop the copies of the untouched weights, when training begins."""
        self._untouched = {}

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Restore the weights from before the first link; if the block raises, subtract its product again."""
        if not self._untouched:
            yield
            return
        held = self._untouched
        self.restore()
        try:
            yield
        except BaseException:
            self.give_back()
            self._untouched = held
            raise

    @torch.no_grad()
    def drop(self) -> None:
        """Before a link is removed without a tie, undo `give_back`."""
        self.restore()
        for path, start in self.of.items():
            self.live.add(path, (start.A, start.B, self.live.layers[path].scaling), self.live.index, "dropped")
        self.clear()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copies of the untouched weights back, where there are any."""
        for path, values in self._untouched.items():
            layer = self.live.layers[path]
            if layer.kind.quantized:
                quantized.put_parts(layer.holder, values)
                if path in self.live.originals:
                    self.live.originals[path] = self.live.originals[path].bare()
            else:
                copy_whole(layer.plain_weight, values["weight"])
            self.of.pop(path, None)
            self.live.residuals.pop(path, None)
        self._untouched = {}

    def resume(self, A: Mapping[str, Tensor], B: Mapping[str, Tensor], lost: Mapping[str, Tensor]) -> None:
        """Continue with a link that began at these factors; the model's state dict brings the weights without them.

        Call `LiveLink.take_links` first.
        """
        self.clear()
        for path in A:
            layer, originals = self.live.layers[path], self.live.originals
            device = layer.lora_A.device
            self.of[path] = Start(A[path].to(device), B[path].to(device), float(lost[path]))
            if path in originals:
                originals[path] = originals[path].extended([(A[path], B[path], -layer.scaling)])


def _values(layer: Any) -> dict[str, Tensor]:
    values = quantized.parts(layer.holder) if layer.kind.quantized else {"weight": layer.plain_weight}
    return {name: value.detach().clone() for name, value in values.items()}
