"""What a run knows of the base model that its links belong on: fingerprints, and what training has moved since."""

from collections.abc import Iterable, Mapping

import torch

from cola import origin, replay
from cola.adapters.targets import base_tensors, buffers_by_name, modules_by_name, shared_weights, tensors_of
from cola.chain import Chain
from cola.composed import Composed
from cola.fingerprint import Digests, Fingerprint, TensorPrint, digests, weight_of
from cola.live import LiveLink
from cola.origin import Origin


class KnowsBase(Composed):
    """The untouched base and the values trained beside the links, for `ChainOptimizer` to inherit."""

    chain: Chain
    live: LiveLink
    _digests: Digests
    _origin: Origin

    def _weights(self) -> Fingerprint:
        """Fingerprint of the adapted layers' weights as they are; they change at knots."""
        return replay.take_fingerprint(self.live.model, self.live.layers, cache=self._digests)

    def _final_digest(self) -> str | None:
        """The same after `finish`; None if the model does not have those layers any more."""
        tensors = base_tensors(self.live.model)
        return self._weights().digest if all(weight_of(path) in tensors for path in self.live.layers) else None

    def _untouched(self, layers: Iterable[str] = ()) -> Fingerprint:
        """Fingerprint of the whole base, while the adapted weights are still its own: one pass over the model."""
        every = dict.fromkeys((*self.live.layers, *layers))
        return replay.take_fingerprint(
            self.live.model, every, whole=True, known=self._origin.prints, cache=self._digests
        )

    def _settle_origin(self) -> None:
        """Before a step or a knot: what it will move for the first time is looked at."""
        if self.chain.keep and not self._origin.settled:
            self._origin.settle(self._moving())

    def _moving(self) -> dict[str, torch.Tensor]:
        """The base's tensors that training moves: persistent buffers, and what is trained beside the links.

        Whatever else asks for a gradient is counted too: another optimizer of the caller's may train it.
        """
        model, trained = self.live.model, self.live.trained()
        shared, names = shared_weights(model), set(buffers_by_name(model))
        for path, parameter in trained.items():
            names.update((path, *shared.get(id(parameter), ())))
        return {name: t for name, t in base_tensors(model).items() if name in names or t.requires_grad}

    def _resume_origin(
        self,
        moving: Mapping[str, torch.Tensor],
        base: Fingerprint | None,
        otherwise: Mapping[str, TensorPrint],
    ) -> None:
        recorded = base.others if base is not None else None
        self._origin.resume(moving, {**otherwise, **(recorded or {})})

    def _moved(self, *, modules: bool = True) -> dict[str, torch.Tensor]:
        """Persistent buffers that are no longer the base's, or were not at a knot; copies on the CPU.

        Args:
            modules: with those of modules whose parameters are all trained, which PEFT's format holds as a whole.
        """
        if not self.chain.keep:
            return {}
        buffers, trained = buffers_by_name(self.live.model), self.live.trained().keys()
        always = {name for link in self.chain for name in link.trained}
        for path, module in modules_by_name(self.live.model).items() if modules else ():
            own = tensors_of(path, module)
            parameters = own.keys() - buffers.keys()
            if parameters and parameters <= trained:
                always.update(own.keys() - parameters)
        # a chain that was loaded apart from the optimizer's state knows its base better
        known = {**self._origin.prints, **((self.chain.base.others if self.chain.base is not None else None) or {})}
        return origin.moved(buffers, digests(buffers), known, always)

    def _has_unrecorded(self) -> bool:
        """Whether buffers have moved since the last knot."""
        last = {name: value for link in self.chain for name, value in link.trained.items()}
        return any(n not in last or not torch.equal(last[n], value) for n, value in self._moved(modules=False).items())
