"""Ties weights that may be sharded over processes.

A knot gathers the factors, which are small, but never a weight: each process ties its part, and rounds it exactly as
within the whole.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cola.common.distributed import is_sharded, part_here
from cola.knot.tie import Tie, delta_norm, obstacle, tie_


def tie_anywhere(
    weight: Tensor, left: Tensor, right: Tensor, scaling: float, *, rounding: str, seed: int, residual: Tensor | None
) -> Tie:
    """`cola.knot.tie.tie_` on a weight that may be sharded; ``left`` and ``right`` are whole.

    A sharded weight has no residual: `LiveLink.check` refuses it.
    """
    if not is_sharded(weight):
        return tie_(weight, left, right, scaling, rounding=rounding, seed=seed, residual=residual)
    local, (rows, columns) = part_here(weight)
    place: Any = {"part_of": tuple(weight.shape), "offset": (rows.start, columns.start)}
    part = tie_(local, left[rows], right[:, columns], scaling, rounding=rounding, seed=seed, **place)
    norms = part.lost, part.deviation, part.weight or 0.0
    squares = torch.tensor([norm**2 for norm in norms], dtype=torch.float64, device=local.device)
    lost, deviation, norm = _sum_over_shards(squares, weight).sqrt().tolist()
    return replace(part, delta=delta_norm(left, right, scaling), lost=lost, deviation=deviation, weight=norm)


def obstacle_anywhere(weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> str | None:
    """`cola.knot.tie.obstacle` on a weight that may be sharded; all its processes agree whether there is one."""
    if not is_sharded(weight):
        return obstacle(weight, left, right, scaling)
    local, (rows, columns) = part_here(weight)
    mine = obstacle(local, left[rows], right[:, columns], scaling) if local.numel() else None
    found = torch.full((1,), float(mine is not None), dtype=torch.float32, device=local.device)
    somewhere = _sum_over_shards(found, weight).item()
    return mine or ("cannot hold W + sBA in another process's part" if somewhere else None)


def _sum_over_shards(values: Tensor, tensor: Any) -> Tensor:
    for dim, placement in enumerate(tensor.placements):
        if placement.is_shard():
            torch.distributed.all_reduce(values, group=tensor.device_mesh.get_group(dim))
    return values
