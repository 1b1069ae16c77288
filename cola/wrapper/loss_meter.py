"""Measures the loss that each optimizer step has optimised, without a device sync."""

import numbers
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cola.common.distributed import is_sharded

ParamGroups = Iterable[Mapping[str, Any]]


class LossMeter:
    """The mean loss of each optimizer step, from the first of these sources that has one.

    1. The mean of the losses passed to `tell`.
    2. The loss passed to `give` by a training framework.
    3. A closure's first run: its losses if it backpropagated several, otherwise its result.
    4. The ``.loss`` of the model's outputs. A forward hook puts a hook on this tensor, so a loss counts when backward
       runs through it, weighted by its gradient: the step's loss is ``Σ g·loss / Σ |g|``. A loss that is never
       backpropagated has no weight; accumulation, with or without division, and loss scaling do not change the mean.

    Losses of a forward with ``num_items_in_batch`` are shares of the step's mean, and are added up. `torch.compile`
    hides gradients: inside it a training forward counts with weight 1.

    Args:
        model: the model whose forward is hooked. The meter does not hold the optimizer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.told = _Mean()
        self.seen: list[tuple[Tensor, Tensor]] = []  # losses and their gradients, one pair for each backward
        self._traced: Tensor | None = None  # sum and count of the losses of compiled forwards
        self._shares = False
        self._given: Tensor | None = None
        self._first: Tensor | None = None  # the loss of the closure's first run in a step
        # a gradient that the last step with a told loss used, and its version
        self._stepped: tuple[weakref.ref[Tensor], int] | None = None
        self._backward = -1  # autograd's number of the last backward seen
        self.handle = model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """The forward hook."""
        loss = getattr(output, "loss", None)
        if loss is None and isinstance(output, dict):
            loss = output.get("loss")
        elif loss is None and isinstance(output, tuple) and output and kwargs.get("labels") is not None:
            loss = output[0]  # transformers with return_dict=False
        if not isinstance(loss, Tensor) or not loss.requires_grad or loss.numel() != 1:
            return
        if torch._C._are_functorch_transforms_active():
            return  # torch.func computes gradients without a backward
        self._shares = kwargs.get("num_items_in_batch") is not None
        value = _copied(loss)  # the training loop may divide the loss in place
        if not torch.compiler.is_compiling():
            loss.register_hook(partial(self._backpropagated, module, value))
        elif module.training:
            pair = torch.stack((value, torch.ones_like(value)))
            self._traced = pair if self._traced is None else self._traced + pair

    def _backpropagated(self, module: nn.Module, value: Tensor, gradient: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if self.seen and backward != self._backward and not _has_gradients(module):
            self.seen.clear()  # model.zero_grad() has dropped the gradients of a skipped step
        self._backward = backward
        self.seen.append((value, gradient.detach().reshape(())))

    def tell(self, loss: Tensor | float) -> None:
        """Add a loss from the caller, which replaces those seen. Tensors stay on their device."""
        if not isinstance(loss, (Tensor, numbers.Real)):
            raise TypeError(f"observe(loss={loss!r}) needs a number or a tensor with one element")
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"observe(loss) needs one number, got a tensor of shape {tuple(loss.shape)}: reduce it")
        self.told.add(loss)

    def give(self, loss: Tensor) -> None:
        """Set the next step's mean loss, as a training framework computed it."""
        self._given = _copied(loss)

    def first_of(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Wrap ``closure`` to keep the loss of its first run: LBFGS runs it many times in a step."""
        self._first, ran = None, False

        def run() -> Any:
            nonlocal ran
            result = closure()
            if not ran:
                ran, self._first = True, self._of_closure(result)
            self.clear()
            return result

        return run

    def take(self, groups: ParamGroups) -> Tensor | None:
        """Return the loss of the step just taken over ``groups`` as a 0-d tensor, or None, and forget all losses."""
        told, first, given = self.told.take(), self._first, self._given
        self._first = None
        if told is not None:
            used = _gradient(groups)
            self._stepped = None if used is None else (weakref.ref(used), used._version)
        elif given is not None:
            told = given
        else:
            told = self._mean_seen() if first is None else first
        self.clear()
        return told

    def drop(self, groups: ParamGroups) -> None:
        """Forget the losses of the gradients in ``groups``, which are about to be zeroed.

        Told losses are dropped if no step has used the gradients (a loss scaler skipped the step). Otherwise they stay,
        for the next backward.
        """
        if self.told.count:
            present, used = _gradient(groups), self._stepped
            if present is not None and (used is None or present is not used[0]() or present._version != used[1]):
                self.told.take()
        self.clear()

    def clear(self) -> None:
        """Forget all losses but the told ones."""
        self.seen.clear()
        self._traced = self._given = None

    def remove(self) -> None:
        """Remove the forward hook."""
        self.handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stepped": None}  # weak references cannot be copied or pickled

    def _of_closure(self, result: Any) -> Tensor | None:
        if self._given is not None:
            return self._given
        number = isinstance(result, numbers.Real) or (isinstance(result, Tensor) and result.numel() == 1)
        if len(self.seen) > 1 or not number:
            return self._mean_seen()
        return _copied(_number(result))

    def _mean_seen(self) -> Tensor | None:
        if not self.seen:
            if self._traced is None:
                return None
            total, count = self._traced.unbind()
            return total.clone() if self._shares else total / count
        if len(self.seen) == 1:
            ((value, weight),) = self.seen
            return value * weight.sign()
        device = self.seen[0][0].device
        values = torch.stack([value.to(device) for value, _ in self.seen])
        weights = torch.stack([weight.to(values) for _, weight in self.seen])
        total = weights.abs().sum().clamp(min=torch.finfo(weights.dtype).tiny)  # losses times zero
        mean = (values * weights).sum() / total
        return mean * len({id(value) for value, _ in self.seen}) if self._shares else mean


def _gradient(groups: ParamGroups) -> Tensor | None:
    """The first gradient in the groups."""
    return next((p.grad for group in groups for p in group["params"] if p.grad is not None), None)


def _copied(loss: Tensor) -> Tensor:
    """A 0-d copy in at least fp32."""
    dtype = torch.promote_types(loss.dtype, torch.float32)
    return loss.detach().reshape(()).to(dtype, copy=True)


def _has_gradients(module: nn.Module) -> bool:
    """Whether backward has left gradients; FSDP2 may keep those of sharded parameters elsewhere until the last one."""
    return any(p.grad is not None or is_sharded(p) for p in module.parameters())


class _Mean:
    """A running mean, whose sum stays on its device."""

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
        return _number(total) / count  # a copy: the caller may overwrite the loss


def _number(value: Any) -> Tensor:
    # a Python number would take the caller's default dtype and device
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32, device="cpu")
