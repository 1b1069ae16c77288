"""Real steps and probes. Distributed checkpointing makes an optimizer create its state by a step that moves nothing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cola.common.distributed import whole


def moves(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether a step over ``groups`` is a real one: some gradient, and not all of learning rates and gradients zero.

    A warm-up step from learning rate 0 is real: it has gradients. They are read (which waits for their device) only
    when all learning rates are zero.
    """
    for group in groups:  # plain loops: nearly always the first parameter decides, at every step
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
    """Groups of ``base`` in which no parameter has state: what a probe is about to fill."""
    state = base.state
    return [i for i, group in enumerate(base.param_groups) if not any(state.get(p) for p in group["params"])]


def _is_zero(lr: Any) -> bool:
    if isinstance(lr, Tensor):
        return lr.device.type == "cpu" and bool((lr == 0).all())  # reading it elsewhere would wait for the device
    return lr == 0
