"""What is trained beside the links: biases, heads, norms, and whatever the caller adds. No knot touches it."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cola.common.distributed import whole
from cola.lora.names import modules_by_name, parameters_by_name, shared_weights

logger = logging.getLogger("cola")


class Trainable:
    """The parameters of a model that are trained beside its links.

    It holds modules and names, never Parameters, which frameworks replace.

    Args:
        model: whose they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._held: list[tuple[nn.Module, str]] = []

    def add(self, owner: nn.Module, name: str) -> None:
        """Count the parameter that ``owner`` has under ``name`` among them; nothing if it has None there."""
        if owner._parameters.get(name) is not None:
            self._held.append((owner, name))

    def add_all(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count those of ``parameters`` that are the model's own among them, and unfreeze these."""
        wanted = {id(p) for p in parameters}
        for module in modules_by_name(self.model).values():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in wanted:
                    self.add(module, name)
                    parameter.requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        """They, by canonical path. One that several modules share is listed under its first path."""
        wanted = {(id(owner), name) for owner, name in self._held}
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for path, module in modules_by_name(self.model).items():
            for name, parameter in module._parameters.items():
                if parameter is not None and (id(module), name) in wanted:
                    found.setdefault(id(parameter), (f"{path}.{name}".lstrip("."), parameter))
        return dict(found.values())

    def values(self) -> dict[str, Tensor]:
        """Copies of their values on the CPU, as a link records them.

        One that several modules share is listed under every path: elsewhere they may not be tied.
        """
        shared, parameters = shared_weights(self.model), parameters_by_name(self.model)
        values: dict[str, Tensor] = {}
        for path, parameter in self.parameters().items():
            values[path] = whole(parameter.detach()).cpu().clone()
            for other in shared.get(id(parameter), ()):
                if other != path:
                    same = parameters[other] is parameter
                    values[other] = values[path] if same else whole(parameters[other].detach()).cpu().clone()
        return values


def require_apart(param_group: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuse to train what knots change: the record of a link could not tell the one change from the other.

    Args:
        param_group: to be added to an optimizer; an iterator of parameters in it is made a list.
        weights: of the adapted layers, by path.

    Raises:
        TypeError: it is not a dict with ``"params"``.
        ValueError: it holds one of them.
    """
    if not isinstance(param_group, dict) or "params" not in param_group:
        raise TypeError(f"param_group={param_group!r:.80} must be a dict with 'params', as torch's optimizers take it")
    if isinstance(param_group["params"], Iterator):
        param_group["params"] = list(param_group["params"])
    params = param_group["params"]
    held = {id(p) for p in ([params] if isinstance(params, Tensor) else params)}
    for path, weight in weights.items():
        if id(weight) in held:
            raise ValueError(
                f"param_group holds the weight of the adapted layer {path!r}, which its links are tied into: train the "
                "layer by its link or as a whole (modules_to_save), not both"
            )


def warn_of_half(parameters: Mapping[str, Tensor]) -> None:
    """Say which trained parameters are fp16: a `GradScaler` refuses their gradients without naming them.

    Args:
        parameters: by name.
    """
    found = [name for name, parameter in parameters.items() if parameter.dtype == torch.float16]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        logger.warning(
            "%s%s will be trained in float16, for which GradScaler raises 'Attempting to unscale FP16 gradients': make "
            "what is trained float32 before the ChainOptimizer is made (for a head: head.float(), and train under "
            "autocast), or use bfloat16",
            ", ".join(found[:3]), more,
        )  # fmt: skip
