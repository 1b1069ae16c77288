"""Sees a model's training losses go by, without waiting for the device and without holding the optimizer."""

from typing import Any

import torch
from torch import Tensor, nn


class LossWatch:
    """Adds up the ``.loss`` of a model's training outputs until a step takes their mean.

    It is a forward hook on the model and knows nothing of the optimizer, so copying or pickling the model takes
    along two small numbers and no more.

    Args:
        model: to watch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.total: Tensor | float | None = None
        self.count = 0
        self._handle = model.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook."""
        loss = getattr(output, "loss", None)
        if loss is None and isinstance(output, dict):
            loss = output.get("loss")
        if module.training and isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
            self.tell(loss)

    def tell(self, loss: Tensor | float) -> None:
        """Add one loss. Tensors stay on their device."""
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(
                    f"observe(loss) needs one number, got a tensor of shape {tuple(loss.shape)}: reduce it"
                )
            loss = loss.detach().reshape(())
        self.total = loss if self.total is None else self.total + loss
        self.count += 1

    def take(self, result: Any = None) -> Tensor | None:
        """Mean of the losses since the last call as a 0-d tensor, else the closure's ``result``, else None."""
        total, count = self.total, self.count
        self.total, self.count = None, 0
        if total is None:
            total, count = result, 1
        if total is None:
            return None
        value = total if isinstance(total, Tensor) else torch.tensor(float(total))
        return value.detach().reshape(()) / count

    def remove(self) -> None:
        """Stop watching."""
        self._handle.remove()
