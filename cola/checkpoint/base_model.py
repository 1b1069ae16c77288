"""Remembers the untouched base model of a run: its fingerprint, and the tensors that training has moved since.

Parameters trained alongside the links (biases, heads) move at steps, so their digests are taken before the first step.
Buffers (running statistics) move with every forward pass in training mode. Their digests are taken when the chain is
made, and again if a state dict is loaded into them before training begins.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cola.chain import replay
from cola.chain.chain import Chain
from cola.chain.fingerprint import Digests, Fingerprint, TensorPrint, digests, prints_of
from cola.lora.live import LiveLink
from cola.lora.names import (
    base_modules,
    base_tensors,
    buffers_by_name,
    modules_by_name,
    shared_weights,
    tensors_of,
    weight_name,
)


class BaseModel:
    """A run's knowledge of its base model."""

    def __init__(self, live: LiveLink, chain: Chain) -> None:
        self.live, self.chain = live, chain
        self.settled = False  # whether the digests of all trained tensors have been taken
        self._digests = Digests()
        self._loads = _Loads(live.model)

    @property
    def prints(self) -> dict[str, TensorPrint]:
        """Prints of the tensors that training moves. If the value in the base model is unknown, the digest is None."""
        return self._loads.prints

    def weights(self) -> Fingerprint:
        """Fingerprint of the adapted layers' present weights."""
        return replay.take_fingerprint(self.live.model, self.live.layers, cache=self._digests)

    def final_digest(self) -> str | None:
        """Digest of `weights` after `finish`; None if the model no longer has those layers."""
        tensors = base_tensors(self.live.model)
        names = (weight_name(path, layer) for path, layer in self.live.layers.items())
        return self.weights().digest if all(name in tensors for name in names) else None

    def fingerprint(self, layers: Iterable[str] = ()) -> Fingerprint:
        """Fingerprint of the whole base model. It reads the weights, so call it while no link is tied.

        Args:
            layers: paths of further layers, which another chain's links change.
        """
        every = dict.fromkeys((*self.live.layers, *layers))
        return replay.take_fingerprint(self.live.model, every, whole=True, known=self.prints, cache=self._digests)

    def settle(self) -> None:
        """Before a step or a knot, take the digests of the tensors that it will move for the first time."""
        if self.chain.keep and not self.settled:
            self.prints.update(prints_of({n: t for n, t in self._moving().items() if n not in self.prints}))
            self.settled = self._loads.over = True

    def resume(self, recorded: Fingerprint | None, known: Mapping[str, TensorPrint] | None = None) -> None:
        """Continue a run whose training had begun.

        Args:
            recorded: the chain's fingerprint of the base model, if it has one.
            known: prints from before training; None to take them from the model now.
        """
        moving = self._moving()
        known = {**(prints_of(moving) if known is None else known), **((recorded and recorded.others) or {})}
        unknown = prints_of(moving, {})
        self._loads.prints = {name: known.get(name, unknown[name]) for name in moving}
        self.settled = self._loads.over = True

    def moved(self, *, modules: bool = True) -> dict[str, Tensor]:
        """CPU copies of the persistent buffers that differ from the base model's, or did so at an earlier knot.

        Args:
            modules: include all buffers of modules whose parameters are all trained, because PEFT's format holds such a
                module as a whole.
        """
        if not self.chain.keep:
            return {}
        model = self.live.model
        buffers, trained = buffers_by_name(model), self.live.trained().keys()
        always = {name for link in self.chain for name in link.trained}
        for path, module in modules_by_name(model).items() if modules else ():
            own = tensors_of(path, module)
            parameters = own.keys() - buffers.keys()
            if parameters and parameters <= trained:
                always.update(own.keys() - parameters)
        # a chain that was loaded separately knows its base model better than the optimizer's state
        known = {**self.prints, **((self.chain.base and self.chain.base.others) or {})}
        found = digests(buffers)
        return {
            name: buffer.detach().cpu().clone()
            for name, buffer in buffers.items()
            if not buffer.is_meta and (name in always or name not in known or known[name].digest != found[name])
        }

    def has_unrecorded(self) -> bool:
        """Whether buffers have moved since the last knot."""
        last = {name: value for link in self.chain for name, value in link.trained.items()}
        return any(n not in last or not torch.equal(last[n], value) for n, value in self.moved(modules=False).items())

    def to_json(self) -> dict[str, Any]:
        """`prints` as JSON values."""
        return {name: one.to_json() for name, one in self.prints.items()}

    @property
    def handles(self) -> list[RemovableHandle]:
        """Those of the hooks that watch which buffers are loaded."""
        return self._loads.handles

    def close(self) -> None:
        """Stop watching which buffers are loaded."""
        self._loads.remove()

    def _moving(self) -> dict[str, Tensor]:
        """The base model's tensors that training moves: persistent buffers, and parameters trained alongside the links.

        Every parameter that requires a gradient counts, because another optimizer of the caller's may train it.
        """
        model, trained = self.live.model, self.live.trained()
        shared, names = shared_weights(model), set(buffers_by_name(model))
        for path, parameter in trained.items():
            names.update((path, *shared.get(id(parameter), ())))
        return {name: t for name, t in base_tensors(model).items() if name in names or t.requires_grad}


class _Loads:
    """Updates the prints of buffers when state dicts are loaded before training.

    Its hooks do not hold the optimizer, so copying or pickling the model takes along nothing but digests.
    """

    def __init__(self, model: nn.Module) -> None:
        self.prints: dict[str, TensorPrint] = {}
        self.over = False  # whether training has begun, and loaded values are no longer the base model's
        self.handles: list[RemovableHandle] = []
        for path, module in base_modules(model).items():
            buffers = tensors_of(path, module, parameters=False)
            if buffers:
                self.prints.update(prints_of(buffers))
                hook = functools.partial(self._loaded, path)
                self.handles.append(module.register_load_state_dict_post_hook(hook))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _loaded(self, path: str, module: nn.Module, _: Any) -> None:
        if not self.over:
            self.prints.update(prints_of(tensors_of(path, module, parameters=False)))
