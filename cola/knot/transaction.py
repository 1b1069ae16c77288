"""A knot as a transaction: everything that can fail is tried first and undone; then Algorithm 1's steps follow."""

import time
from collections.abc import Mapping
from typing import Any

from cola.knot.reset import Reset, carried_over
from cola.lora.link import Factor, KnotReport, Link


class NextLink:
    """A link that is ready to begin: drawn, and tried on the layers and the base optimizer.

    Args:
        opt: the `ChainOptimizer`. Its live link and its base's state are unchanged when this returns or raises.
        index: the new link's index.
        old: the live link.
        reset: as in `ChainOptimizer`.
        follows: whether the live link is tied before it begins.

    Raises:
        KnotError: the layers have no room for the link, or state cannot be kept over a change of rank.
        Exception: any that the caller's init, base or reset raises.
    """

    def __init__(self, opt: Any, index: int, old: Mapping[str, Factor], reset: Reset, *, follows: bool = False) -> None:
        self.opt, self.live, self.index = opt, opt.live, index
        self.link = self.live.prepare(index, opt)
        self._fresh = self._state = None
        if follows:
            self.live.starts.check(self.link, index)
        present, rooms = self.live.index, {path: layer.lora_A.shape[-2] for path, layer in self.live.layers.items()}
        grads = [p.grad for p in self.live.adapters()]
        try:
            self.live.begin(index, self.link)
            if index != present:
                self.live.require_extended(old)
            if reset == "state":
                self._fresh = opt._fresh(self.live.adapters())
            else:
                new = {path: (layer.lora_A, layer.lora_B) for path, layer in self.live.layers.items()}
                ranks = {path: factor.rank for path, factor in self.link.items()}
                pairs = {path: (factor.A, factor.B) for path, factor in old.items()}
                blocks = {p: plan.blocks(present, index) for p, plan in self.live.plans.items() if plan.parts}
                scales = {path: factor.scaling / old[path].scaling for path, factor in self.link.items()}
                self._state = carried_over(opt.base, reset, pairs, new, ranks, blocks, scales)
        finally:
            self.live.begin(present, old)
            self.live.make_room(rooms)
            for parameter, grad in zip(self.live.adapters(), grads):
                parameter.grad = grad

    def begin(self) -> None:
        """Put the link on the layers, and subtract its product from the weights if it does not start at zero."""
        self.live.begin(self.index, self.link)
        self.live.starts.give_back()

    def reset(self) -> None:
        """Give the base the new link's state."""
        if self._fresh is not None:
            self.opt._adopt(self._fresh, self.live.adapters())
        if self._state is not None:
            for layer in self.live.layers.values():
                for parameter in (layer.lora_A, layer.lora_B):
                    self.opt.base.state.pop(parameter, None)
            self.opt.base.state.update(self._state)


class Knot:
    """A knot that is ready to be tied: the link can be added to the weights, and the next one can begin.

    Args:
        opt: the `ChainOptimizer`, which is unchanged when this returns or raises.
        extend: whether a new link follows.

    Raises:
        KnotError: a factor, or a weight with the link in it, is not finite.
        Exception: as `NextLink`.
    """

    def __init__(self, opt: Any, *, extend: bool) -> None:
        self._started = time.perf_counter()
        self.opt, self.live, self.chain = opt, opt.live, opt.chain
        self.index, keep, base_model = self.live.index, self.chain.keep, opt._base_model
        self.chain._require_next(self.index)
        self.live.check()
        opt._untrained.look(self.live, opt.base, opt.steps - opt._tied_at())
        self.link = self.live.snapshot()
        self.rank = self.live.rank
        self.factors = {path: factor.cpu() for path, factor in self.link.items()} if keep else {}
        self.trained = {**self.live.trainable.values(), **base_model.moved()} if keep else {}
        self.rows = self.live.trained_rows() if keep else {}
        self.base = self.chain.base
        if self.base is None and self.index == 0 and keep:
            self.base = base_model.fingerprint()
        self._next = NextLink(opt, self.index + 1, self.link, opt.reset, follows=True) if extend else None

    def tie(self) -> None:
        """``W ← round(W + s·B A)`` on every layer."""
        self.ties = self.live.tie(self.index, self.link)

    def record(self) -> KnotReport:
        """Append the link and its report to the chain."""
        ties, loss = self.ties, self.opt._loss
        report = KnotReport(
            index=self.index,
            step=self.opt.steps,
            rank=self.rank,
            delta_norm=sum(t.delta**2 for t in ties.values()) ** 0.5,
            lost_norm=sum(t.lost**2 for t in ties.values()) ** 0.5,
            loss=None if loss is None else float(loss),
            seconds=time.perf_counter() - self._started,
            layers={path: self.live.report(path, tie) for path, tie in ties.items()},
        )
        self.chain.base = self.base
        self.chain._append(Link(self.index, self.live.seed, self.factors, self.trained, report, self.rows))
        return report

    def extend(self) -> None:
        """Begin the next link: a new draw of A, and B zero, unless the caller's init returns another B."""
        assert self._next is not None
        self._next.begin()

    def reset(self) -> None:
        """Give the factors fresh optimizer state, or the state that the caller's ``reset`` makes."""
        assert self._next is not None
        self._next.reset()
