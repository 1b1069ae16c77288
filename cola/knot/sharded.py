"""Ties weights that may be sharded over processes.

A knot gathers the factors, which are small, but never a weight: each process ties its part, and rounds it exactly as
within the whole. A weight of E matrices (fused experts) is tied matrix by matrix, so that no update of all is formed.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cola.common.distributed import is_sharded, part_here
from cola.knot.tie import Tie, delta_norm, key, obstacle, tie_


def tie_anywhere(
    weight: Tensor, left: Tensor, right: Tensor, scaling: float, *, rounding: str, seed: int, residual: Tensor | None
) -> Tie:
    """`cola.knot.tie.tie_` on a weight (m×n, or E×m×n) that may be sharded; ``left`` and ``right`` are whole.

    A sharded weight has no residual: `LiveLink.check` refuses it.
    """
    part, window = part_here(weight) if is_sharded(weight) else (weight, None)
    ties = []
    for index, (matrix, place) in _matrices(part, window):
        own = seed if index is None else key(seed, index)
        memory = residual if residual is None or index is None else residual[index]
        L, R = _cut(left, right, index, place)
        at: Any = (
            {} if place is None else {"part_of": tuple(weight.shape[-2:]), "offset": tuple(p.start for p in place)}
        )
        ties.append(tie_(matrix, L, R, scaling, rounding=rounding, seed=own, residual=memory, **at))
    if window is None and len(ties) == 1:
        return ties[0]
    norms = [math.hypot(*found) for found in zip(*((t.lost, t.deviation, t.weight or 0.0) for t in ties))] or [0.0] * 3
    if window is not None:
        squares = torch.tensor([norm**2 for norm in norms], dtype=torch.float64, device=part.device)
        norms = _sum_over_shards(squares, weight).sqrt().tolist()
    return Tie(delta_norm(left, right, scaling), *norms)


def obstacle_anywhere(weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> str | None:
    """`cola.knot.tie.obstacle` on a weight that may be sharded; all its processes agree whether there is one."""
    part, window = part_here(weight) if is_sharded(weight) else (weight, None)
    mine = None
    for index, (matrix, place) in _matrices(part, window):
        if matrix.numel():
            mine = mine or obstacle(matrix, *_cut(left, right, index, place), scaling)
    if window is None:
        return mine
    found = torch.full((1,), float(mine is not None), dtype=torch.float32, device=part.device)
    somewhere = _sum_over_shards(found, weight).item()
    return mine or ("cannot hold W + sBA in another process's part" if somewhere else None)


def _matrices(part: Tensor, window: tuple[slice, ...] | None) -> Iterator[tuple[int | None, tuple[Tensor, Any]]]:
    """The matrices of a part: each one's number in the whole weight (None if there is one), itself and its place."""
    if part.dim() == 2:
        yield None, (part, window)
        return
    first = 0 if window is None else window[0].start
    for index, matrix in enumerate(part, first):
        yield index, (matrix, None if window is None else window[1:])


def _cut(left: Tensor, right: Tensor, index: int | None, place: tuple[slice, slice] | None) -> tuple[Tensor, Tensor]:
    """L and R of one matrix, or of the part of it at ``place``."""
    if index is not None:
        left, right = left[index], right[index]
    return (left, right) if place is None else (left[place[0]], right[:, place[1]])


def _sum_over_shards(values: Tensor, tensor: Any) -> Tensor:
    for dim, placement in enumerate(tensor.placements):
        if placement.is_shard():
            torch.distributed.all_reduce(values, group=tensor.device_mesh.get_group(dim))
    return values
