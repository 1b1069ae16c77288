"""Ties a link into a weight: ``W ← round(W + s·L R)`` in place, rounded once, and measures what rounding lost.

``L R`` is the link's update: ``B A`` for a weight stored as out×in, ``Aᵀ Bᵀ`` for one stored as in×out. The tie goes
through blocks of rows that fit a core's cache, with three buffers of a block's size, and measures the rounding of each
block at once, so that the weight is read and written once.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cola.common.contexts import without_autocast
from cola.knot.rounding import Noise, move_to_neighbour, round_stochastically, sum_and_measure, sum_in_own_precision

ROUNDINGS = ("nearest", "stochastic", "compensated")
#: values of ``rounding`` in a link's record; the last two are for quantised layers
RECORDED = (*ROUNDINGS, "stack", "requantize")
TIEABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Elements per block and thread. On a CPU a block and its three buffers take 1 MB in fp32, which fits a core's
# second-level cache. On an accelerator a block is 1/64 of the weight, for few launches.
_CPU_BLOCK = 1 << 16


class KnotError(RuntimeError):
    """A knot must not be tied, or an invariant of it does not hold; the message names the layer."""


@dataclass(frozen=True)
class Tie:
    """Frobenius norms of one tie of one weight.

    Attributes:
        delta: ``‖s·L R‖``, the norm of the update.
        lost: norm of the part of the update that is neither in the weight nor in the residual buffer.
        deviation: ``‖W' − (W + s·L R)‖``, the error of the stored weight, where W includes the old residual. Equals
            ``lost`` unless rounding is compensated.
        weight: ``‖W'‖``; None where it was not measured.
    """

    delta: float
    lost: float
    deviation: float
    weight: float | None


def key(seed: int, *path: object) -> int:
    """Map ``(seed, link, layer, …)`` to a 63-bit seed: the same on every machine, process and device."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def delta_norm(left: Tensor, right: Tensor, scaling: float) -> float:
    """``‖s·L R‖_F`` from r×r Gram matrices, in float64; ``left`` is (…, m, r), ``right`` (…, r, n)."""
    left, right = left.double(), right.double()
    square = torch.sum((left.mT @ left) * (right @ right.mT)).item()
    return abs(scaling) * math.sqrt(max(square, 0.0))


def residual_like(weight: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """A zero residual buffer for compensated ties of ``weight``.

    A half-precision weight gets a bf16 residual: residuals are ``2⁻⁸`` to ``2⁻¹¹`` of the weight, where fp16 runs out
    of exponents. fp32 and fp64 weights get a residual of their dtype.
    """
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return torch.zeros(weight.shape, dtype=torch.bfloat16 if half else weight.dtype, device=device)


@torch.no_grad()
@without_autocast()
def obstacle(weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> str | None:
    """Why a tie would leave a non-finite value, as the end of a sentence about the layer; None if it would not.

    Changes nothing. The sum must not exceed the dtype's largest number, so that rounding either way stays finite.
    """
    limit = torch.finfo(weight.dtype).max
    low, high = (value.item() for value in torch.aminmax(weight))
    if not math.isfinite(low) or not math.isfinite(high):
        return f"has a weight with non-finite values ({low:g} to {high:g})"
    left_norm = torch.linalg.vector_norm(left.double(), dim=1).max().item()
    right_norm = torch.linalg.vector_norm(right.double(), dim=0).max().item()
    if max(-low, high) + abs(scaling) * left_norm * right_norm <= limit:  # |(L R)_ij| ≤ ‖L_i‖‖R_j‖
        return None
    compute = _compute_dtype(weight)
    scaled, right = left.to(compute) * scaling, right.to(compute)
    for rows in _blocks(weight.shape[0], _height((weight.shape[0], weight.shape[1]), weight.device)):
        target = torch.addmm(weight[rows].to(compute), scaled[rows], right)
        if not target.abs().amax() <= limit:
            return f"would get a W + sBA beyond {limit:g}, the largest number of {weight.dtype}"
    return None


@torch.no_grad()
@without_autocast()
def tie_(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    scaling: float,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    residual: Tensor | None = None,
    part_of: tuple[int, int] | None = None,
    offset: tuple[int, int] = (0, 0),
) -> Tie:
    """``W ← round(W + s·L R)`` in place.

    Args:
        weight: W, m×n, fp32, fp64, bf16 or fp16; changed in place.
        left: L, m×r, any floating dtype.
        right: R, r×n, any floating dtype.
        scaling: s.
        rounding: ``"nearest"``; ``"stochastic"``, to one of the two neighbours at random with expectation
            equal to the exact value; ``"compensated"``, to the nearest, keeping the remainder in ``residual``.
        seed: seed of stochastic rounding; the draws depend only on it and on the position in W.
        residual: buffer from `residual_like`, on any device; needed when compensated, changed in place.
        part_of: shape of the whole weight if ``weight`` is a part of one; a part is rounded exactly as within the
            whole.
        offset: where the part begins.

    Returns:
        The norms of the update and of its rounding error.

    Raises:
        ValueError: unknown rounding, or a missing residual.

    Half-precision weights are summed in fp32 and rounded once. fp32 and fp64 weights are summed in their own precision,
    and the rounding error of this addition is recovered exactly (Knuth's two-sum).

    Rounded to nearest, an R that selects columns, or an L that selects rows, takes the time of these alone. The rest
    keeps its bits, where a sum may change the sign of a zero.

    The same call gives the same bits on the same device, with the same library versions, kernels and number of threads.
    Elsewhere the sum of r products may be taken in another order and round differently.

    >>> W = torch.ones(2, 2)
    >>> tie_(W, torch.ones(2, 1), torch.ones(1, 2), 0.5).delta
    1.0
    >>> W
    tensor([[1.5000, 1.5000],
            [1.5000, 1.5000]])
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r} is unknown: choose one of {', '.join(ROUNDINGS)}")
    if (residual is None) == (rounding == "compensated"):
        raise ValueError(f"rounding={rounding!r} with residual={residual is not None}: compensated ties need one")
    if rounding == "nearest":
        if (columns := _selected(right)) is not None:
            return _tie_columns(weight, columns, left, scaling)
        if (rows := _selected(left.t())) is not None:
            return _tie_columns(weight.t(), rows, right.t(), scaling)
    return _tie_all(weight, left, right, scaling, rounding, seed, residual, part_of, offset)


def _selected(right: Tensor) -> Tensor | None:
    """The columns that the rows of R select, if these are different unit vectors."""
    # most R are full, which one look shows; a shard may have no row
    if not right.numel() or torch.count_nonzero(right) != len(right):
        return None
    columns = right.argmax(1)
    units = torch.zeros_like(right).scatter_(1, columns[:, None], 1)
    return columns if len(columns.unique()) == len(right) < right.shape[1] and torch.equal(right, units) else None


def _tie_columns(weight: Tensor, columns: Tensor, left: Tensor, scaling: float) -> Tie:
    """The tie of an R that selects columns. The others would gain zero."""
    columns = columns.to(weight.device)
    part, unit = weight.index_select(1, columns), torch.eye(len(columns), dtype=left.dtype, device=left.device)
    done = _tie_all(part, left, unit, scaling, "nearest", 0, None, None, (0, 0))
    weight.index_copy_(1, columns, part)
    return replace(done, weight=_norm(weight))


def _norm(weight: Tensor) -> float:
    rows = weight if weight.is_contiguous() else weight.t().contiguous()
    height = _height((rows.shape[0], rows.shape[1]), rows.device)
    blocks = (rows[block].to(_compute_dtype(weight)) for block in _blocks(rows.shape[0], height))
    return math.sqrt(float(sum(map(_square, blocks))))


def _tie_all(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    scaling: float,
    rounding: str,
    seed: int,
    residual: Tensor | None,
    part_of: tuple[int, int] | None,
    offset: tuple[int, int],
) -> Tie:
    """The tie of any L and R, block by block."""
    compute, device = _compute_dtype(weight), weight.device
    scaled = left.to(device=device, dtype=compute) * scaling
    right = right.to(device=device, dtype=compute)
    height = _height((weight.shape[0], weight.shape[1]), device)
    noise = None
    if rounding == "stochastic":
        noise = Noise(weight, seed, part_of or (weight.shape[0], weight.shape[1]), offset, height)
    delta = delta_norm(left, right, scaling)
    buffers = [torch.empty(height, weight.shape[1], dtype=compute, device=device) for _ in range(3)]
    in_own_precision = weight.dtype == compute
    squares: list[Any] = [0.0, 0.0, 0.0]  # of the loss, of the deviation, of the new weight
    for rows in _blocks(weight.shape[0], height):
        block, (target, new, spare) = weight[rows], (b[: rows.stop - rows.start] for b in buffers)
        if in_own_precision:
            torch.mm(scaled[rows], right, out=target)
        else:
            target.copy_(block).addmm_(scaled[rows], right)
        if residual is not None:
            target += spare.copy_(residual[rows])
        if in_own_precision:
            if rounding == "nearest":
                error = sum_and_measure(block, target, new)
            else:
                error = sum_in_own_precision(block, target, new, spare)
            if noise is not None:
                move_to_neighbour(new, error, noise.uniform(rows, spare))
            block.copy_(new)
        else:
            if noise is not None:
                round_stochastically(target, new, spare, noise, rows, weight.dtype)
                block.copy_(new)
            else:
                new.copy_(block.copy_(target))
            error = target
        squares[2] += _square(new)
        if not in_own_precision:
            error -= new
        squares[1] += _square(error)
        if residual is not None:
            stored = residual[rows]
            if stored.device != device:
                stored = error.to(stored.dtype)
                residual[rows].copy_(stored)
            else:
                stored.copy_(error)
            squares[0] += _square(error.sub_(new.copy_(stored)))
    if residual is None:
        squares[0] = squares[1]
    lost, deviation, norm = torch.as_tensor(squares, dtype=torch.float64, device="cpu").sqrt().tolist()
    return Tie(delta, lost, deviation, norm)


def tolerance(weight: Tensor, tie: Tie, rank: int) -> float:
    """The largest deviation that rounding alone can explain.

    Each stored value is within one unit in the last place of its target (half a unit when rounded to nearest), so
    ``‖W' − target‖ ≤ eps·‖W'‖`` plus one smallest subnormal per element; the dot products of length r add ``r·eps`` of
    the compute dtype, relative to the update.
    """
    info, compute = torch.finfo(weight.dtype), torch.finfo(_compute_dtype(weight))
    subnormal = info.smallest_normal * info.eps * math.sqrt(weight.numel())
    norm = tie.weight or 0.0
    return info.eps * norm + subnormal + 2 * (rank + 2) * compute.eps * (tie.delta + norm)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _height(shape: tuple[int, int], device: torch.device) -> int:
    """Rows per block; buffers and noise of a tie take less than 5 % of a bf16 weight of 2²⁴ elements."""
    rows, columns = shape
    if device.type == "cpu":
        elements = min(_CPU_BLOCK * torch.get_num_threads(), max(_CPU_BLOCK, rows * columns // 160))
    else:
        elements = max(_CPU_BLOCK, rows * columns // 64)
    return max(1, min(rows, elements // max(1, columns)))  # a shard may have no row


def _blocks(rows: int, height: int) -> Iterator[slice]:
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def _square(values: Tensor) -> Tensor | float:
    """``‖values‖²`` of a contiguous block, to six digits or more.

    A CPU sums single precision five times as fast as it converts it to double, which is left for sums that may under-
    or overflow. An accelerator sums in double at once, because looking at the result would wait for it.
    """
    flat = values.view(-1)
    if values.device.type == "cpu":
        square = torch.dot(flat, flat).item()
        if 1e-25 < square < 1e35:  # terms below fp32's range, at most 2¹⁷ of 2⁻¹²⁶, are negligible against 1e-25
            return square
        return torch.linalg.vector_norm(flat, dtype=torch.float64).item() ** 2
    return torch.linalg.vector_norm(flat, dtype=torch.float64).square()
