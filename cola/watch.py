"""Sees a model's training losses go by, without waiting for the device and without holding the optimizer."""

import numbers
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
        self.seen, self.told = _Mean(), _Mean()
        self._handle = model.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook."""
        loss = getattr(output, "loss", None)
        if loss is None and isinstance(output, dict):
            loss = output.get("loss")
        if module.training and isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
            self.seen.add(loss)

    def tell(self, loss: Tensor | float) -> None:
        """Add one loss that the caller gives; it counts in place of what was seen. Tensors stay on their device.

        Raises:
            TypeError, ValueError: it is not one number.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(
                    f"observe(loss) needs one number, got a tensor of shape {tuple(loss.shape)}: reduce it"
                )
        elif not isinstance(loss, numbers.Real):
            raise TypeError(f"observe(loss={loss!r}) needs a number or a tensor with one element")
        self.told.add(loss)

    def take(self, result: Any = None) -> Tensor | None:
        """The step's loss as a 0-d tensor: the mean of what was told, else a closure's result, else the mean seen.

        A closure may run the model many times in one step (LBFGS); what it returns is the loss of the first.
        """
        told, seen = self.told.take(), self.seen.take()
        if told is not None:
            return told
        if result is None:
            return seen
        if isinstance(result, numbers.Real) or (isinstance(result, Tensor) and result.numel() == 1):
            return _number(result).detach().reshape(())
        return seen

    def remove(self) -> None:
        """Stop watching."""
        self._handle.remove()


class _Mean:
    """A mean that grows; the sum stays on its device."""

    def __init__(self) -> None:
        self.total: Tensor | float | None = None
        self.count = 0

    def add(self, value: Tensor | float) -> None:
        if isinstance(value, Tensor):
            value = value.detach().reshape(())
        self.total = value if self.total is None else self.total + value
        self.count += 1

    def take(self) -> Tensor | None:
        if self.total is None:
            return None
        total, count = self.total, self.count
        self.total, self.count = None, 0
        return _number(total) / count  # a copy: the caller's loss may be a buffer that is written again


def _number(value: Any) -> Tensor:
    # a Python number would take the caller's default dtype and device
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32, device="cpu")
