"""What changes when several processes train one chain: decisions are agreed, and shapes stay."""

import math

import torch
from torch import Tensor


def in_group() -> bool:
    """Whether this process trains together with others."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def writes() -> bool:
    """Whether this process is the one that writes files: the first of its group."""
    return not in_group() or torch.distributed.get_rank() == 0


def shapes_are_free(parameter: Tensor) -> bool:
    """Whether a Parameter's storage may change size: not where DDP buckets or FSDP shards point into it."""
    return not in_group()


def agreed_mean(losses: Tensor) -> float:
    """Mean of the finite values over all processes, as a Python number.

    Waits for the device, and for the other processes: all must call it at the same step.
    """
    finite = losses[torch.isfinite(losses)]
    sums = torch.stack([finite.sum(), torch.full((), finite.numel(), dtype=losses.dtype, device=losses.device)])
    if in_group():
        torch.distributed.all_reduce(sums)
    total, count = sums.tolist()
    return total / count if count else math.nan
