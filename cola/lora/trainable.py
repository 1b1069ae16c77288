"""The extra trained parameters: biases, heads, norms and whatever else the caller adds. Knots leave them alone."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cola.common.distributed import whole
from cola.lora.names import listed, modules_by_name, parameters_by_name, shared_weights
from cola.lora.token_rows import TokenRows

logger = logging.getLogger("cola")


class Trainable:
    """The parameters of a model that are trained in addition to its links.

    It holds modules and names, never Parameters, which frameworks replace.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._held: list[tuple[nn.Module, str]] = []

    def add(self, owner: nn.Module, name: str) -> None:
        """Add the parameter that ``owner`` has under ``name``, unless it is None."""
        if owner._parameters.get(name) is not None:
            self._held.append((owner, name))

    def add_all(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add and unfreeze those of ``parameters`` that belong to the model."""
        wanted = {id(p) for p in parameters}
        for module in modules_by_name(self.model).values():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in wanted:
                    self.add(module, name)
                    parameter.requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The extra trained parameters, by canonical path; a shared one is listed under its first path."""
        wanted = {(id(owner), name) for owner, name in self._held}
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for path, module in modules_by_name(self.model).items():
            for name, parameter in module._parameters.items():
                if parameter is not None and (id(module), name) in wanted:
                    found.setdefault(id(parameter), (f"{path}.{name}".lstrip("."), parameter))
        return dict(found.values())

    def aliases(self) -> dict[str, str]:
        """Further paths of the parameters, with the path that `parameters` lists them under."""
        shared, every = shared_weights(self.model), parameters_by_name(self.model)
        return {
            other: path
            for path, parameter in self.parameters().items()
            for other in shared.get(id(parameter), ())
            if other != path and every[other] is parameter
        }

    def values(self) -> dict[str, Tensor]:
        """Copies of their values on the CPU, as a link records them.

        A shared parameter is listed under every path, for models that do not share it. Rows of a weight are left out:
        a link records them as such.
        """
        shared, parameters = shared_weights(self.model), parameters_by_name(self.model)
        values: dict[str, Tensor] = {}
        rows = {id(owner.trained_rows) for owner, _ in self._held if isinstance(owner, TokenRows)}
        for path, parameter in self.parameters().items():
            if id(parameter) in rows:
                continue
            values[path] = whole(parameter.detach()).cpu().clone()
            for other in shared.get(id(parameter), ()):
                if other != path:
                    same = parameters[other] is parameter
                    values[other] = values[path] if same else whole(parameters[other].detach()).cpu().clone()
        return values


def require_apart(param_group: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuse to train a weight that knots change: a link's record could not tell the two changes apart.

    Args:
        param_group: the group to add to an optimizer; an iterator of parameters in it becomes a list.
        weights: weights of the adapted layers, by path.

    Raises:
        TypeError: ``param_group`` is not a dict with ``"params"``.
        ValueError: it holds one of ``weights``.
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
                "layer by its link (or its trained rows) or as a whole (modules_to_save), not both"
            )


def warn_of_half(parameters: Mapping[str, Tensor]) -> None:
    """Warn of trained parameters in fp16, by name: a `GradScaler` refuses their gradients without naming them."""
    found = [name for name, parameter in parameters.items() if parameter.dtype == torch.float16]
    if found:
        logger.warning(
            "%s will be trained in float16, for which GradScaler raises 'Attempting to unscale FP16 gradients': make "
            "all trained parameters float32 before the ChainOptimizer is made (for a head: head.float(), and train "
            "under autocast), or use bfloat16",
            listed(found),
        )
