"""Tells real optimizer steps from probes, the steps by which distributed checkpointing creates optimizer state."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cola.common.distributed import whole


def moves(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether a step over ``groups`` is real: there are gradients, and some learning rate or gradient is not zero.

    A warm-up step with learning rate 0 is real, as its gradients are not zero. They are read (which waits for their
    device) only if all learning rates are zero.
    """
    for group in groups:  # plain loops, because the first parameter nearly always decides
        for p in group["params"]:
            if p.grad is not None:
                return _may_move(groups)
    return False


def _may_move(groups: Sequence[dict[str, Any]]) -> bool:
    if not rates_are_zero(groups):
        return True
    grads = (p.grad for group in groups for p in group["params"] if p.grad is not None)
    return any(bool(torch.count_nonzero(whole(grad))) for grad in grads)


def rates_are_zero(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether all learning rates are zero."""
    return all(_is_zero(group.get("lr", 1.0)) for group in groups)


def stateless(base: Optimizer) -> list[int]:
    """Indices of the groups of ``base`` in which no parameter has state, which a probe would create."""
    state = base.state
    return [i for i, group in enumerate(base.param_groups) if not any(state.get(p) for p in group["params"])]


def _is_zero(lr: Any) -> bool:
    if isinstance(lr, Tensor):
        return lr.device.type == "cpu" and bool((lr == 0).all())  # reading it elsewhere would wait for the device
    return lr == 0
