"""What training moves beside the links, as it was in the untouched base.

Parameters that are trained beside the links (biases, heads) move at steps, so their digests are taken before the first.
Buffers (running statistics) move with every forward pass in training mode: theirs are taken when the chain is made, and
again where a state dict is loaded into them before training has begun.
"""

import functools
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from cola.adapters.targets import base_modules, tensors_of
from cola.fingerprint import TensorPrint, digests, dtype_name


class Origin:
    """Prints of the base's tensors that training moves.

    Its hooks know nothing of the optimizer, so copying or pickling the model takes along some digests and no more.

    Args:
        model: whose persistent buffers are looked at.

    Attributes:
        prints: by name; those whose value in the base is not known have no digest.
        begun: training has begun, so what is loaded from now on is not the base.
        settled: `settle` has seen all that is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self.prints: dict[str, TensorPrint] = {}
        self.begun = self.settled = False
        self._handles = []
        for path, module in base_modules(model).items():
            buffers = tensors_of(path, module, parameters=False)
            if buffers:
                self.prints.update(take(buffers))
                hook = functools.partial(self._loaded, path)
                self._handles.append(module.register_load_state_dict_post_hook(hook))

    def settle(self, tensors: Mapping[str, Tensor]) -> None:
        """Before a step: take the prints of those that have none yet; training begins."""
        self.prints.update(take({name: tensor for name, tensor in tensors.items() if name not in self.prints}))
        self.begun = self.settled = True

    def resume(self, tensors: Mapping[str, Tensor], known: Mapping[str, TensorPrint]) -> None:
        """Training had begun before: ``tensors`` are no longer the base's, and ``known`` says what these were."""
        unknown = {n: TensorPrint(tuple(t.shape), dtype_name(t), None) for n, t in tensors.items()}
        self.prints = {name: known.get(name, unknown[name]) for name in tensors}
        self.begun = self.settled = True

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: asdict(one) for name, one in self.prints.items()}

    def remove(self) -> None:
        """Stop watching what is loaded."""
        for handle in self._handles:
            handle.remove()

    def _loaded(self, path: str, module: nn.Module, _: Any) -> None:
        if not self.begun:
            self.prints.update(take(tensors_of(path, module, parameters=False)))


def take(tensors: Mapping[str, Tensor]) -> dict[str, TensorPrint]:
    """Prints of tensors as they are."""
    found = digests(tensors)
    return {name: TensorPrint(tuple(t.shape), dtype_name(t), found[name]) for name, t in tensors.items()}


def moved(
    buffers: Mapping[str, Tensor],
    found: Mapping[str, str | None],
    prints: Mapping[str, TensorPrint],
    always: Collection[str],
) -> dict[str, Tensor]:
    """Copies of the buffers that are no longer the base's, and of those named in ``always``."""
    return {
        name: buffer.detach().cpu().clone()
        for name, buffer in buffers.items()
        if not buffer.is_meta and (name in always or name not in prints or prints[name].digest != found[name])
    }
