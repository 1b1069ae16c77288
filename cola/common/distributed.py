"""Helpers for processes that train together: who writes files, shared means and digests, and sharded tensors.

A sharded tensor (a DTensor of FSDP2) is recognised by its ``full_tensor``, so nothing has to be imported.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def in_group() -> bool:
    """Whether this process trains together with others."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def writes() -> bool:
    """Whether this process writes files: the first of its group does."""
    return not in_group() or torch.distributed.get_rank() == 0


def shapes_are_free(parameter: Tensor) -> bool:
    """Whether a Parameter's storage may change size. It may not if DDP buckets or FSDP shards point into it."""
    return not in_group() and not is_sharded(parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The full tensor. All processes that share it must call together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """``target ← value`` for a full ``value``. If ``target`` is sharded, each process keeps its part."""
    if not is_sharded(target):
        target.copy_(value)
        return
    local, window = part_here(target)
    local.copy_(value[window])


def require_supported(model: nn.Module) -> None:
    """Refuse wrappers that would undo a knot.

    Raises:
        ValueError: says what to use instead.
    """
    kinds = {c.__name__ for module in model.modules() for c in type(module).__mro__}
    if "DeepSpeedEngine" in kinds or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "model: DeepSpeed ZeRO keeps its own flat copy of the parameters and would undo every knot: use DDP, or "
            "FSDP2 (torch.distributed.fsdp.fully_shard) under torchrun or Accelerate"
        )
    if "FullyShardedDataParallel" in kinds:
        raise ValueError("model: FSDP1 flattens its parameters: use FSDP2, torch.distributed.fsdp.fully_shard")


def require_unwrapped(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse wrappers that would miss new Parameters, and so not average their gradients.

    Args:
        model: before it is unwrapped.
        weights: of the layers that will get links, by path.

    Raises:
        ValueError: says what to do instead.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("model: DDP would not see the links' parameters: make the ChainOptimizer, then DDP(model)")
    for path, weight in weights.items():
        if is_sharded(weight):
            raise ValueError(
                f"layer {path!r} is sharded already, and FSDP2 would not see the link's parameters: make the "
                "ChainOptimizer first, then fully_shard(model)"
            )


def release(model: nn.Module, layer: Any, names: tuple[str, ...]) -> None:
    """Make FSDP2 forget parameters that ``layer`` will lose; it would put them back at the next forward."""
    for module in model.modules():
        ask = getattr(module, "_get_fsdp_state", None)
        groups: Any = [] if ask is None else getattr(ask(), "_fsdp_param_groups", None)
        if groups is None:
            groups = [getattr(ask(), "_fsdp_param_group", None)]  # type: ignore[misc]
        for group in groups:
            if group is not None:
                group.fsdp_params = [
                    p
                    for p in group.fsdp_params
                    if not (p._module_info.module is layer and p._module_info.param_name in names)
                ]


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put its shards back; after a pass in evaluation the outermost module still holds whole parameters."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            module.reshard()  # type: ignore[operator]


def part_here(tensor: Any) -> tuple[Tensor, tuple[slice, ...]]:
    """This process's part of a DTensor, and its place in the full tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor._local_tensor, tuple(slice(start, start + size) for start, size in zip(starts, sizes))


def shared_out(tensors: Sequence[Tensor], digest: Callable[[Tensor], str]) -> list[str]:
    """``digest`` (32 bytes in hexadecimal digits) of the full sharded tensors; the processes take turns.

    All processes must call together, because gathering a tensor involves them all.
    """
    rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if in_group() else (0, 1)
    rows = torch.zeros(len(tensors), 32, dtype=torch.int32, device=tensors[0].device)
    for i, tensor in enumerate(tensors):
        full = whole(tensor)
        if i % size == rank:
            rows[i] = torch.tensor(list(bytes.fromhex(digest(full))), dtype=torch.int32, device="cpu")
    if in_group():
        torch.distributed.all_reduce(rows)
    return [bytes(row).hex() for row in rows.tolist()]


def agreed_mean(losses: Tensor) -> float:
    """Mean of the finite values over all processes, as a Python number; NaN if there are none.

    It waits for the device and the other processes, so all must call it at the same step.
    """
    finite = losses[torch.isfinite(losses)]
    sums = torch.stack([finite.sum(), torch.full((), finite.numel(), dtype=losses.dtype, device=losses.device)])
    if in_group():
        torch.distributed.all_reduce(sums)
    total, count = sums.tolist()
    return total / count if count else math.nan
