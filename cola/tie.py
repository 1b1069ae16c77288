"""Tie a knot: ``W ← round(W + s·L R)`` in place, rounded once, with an account of what rounding lost.

``L R`` is the link's update: ``B A`` for a weight stored out×in, ``Aᵀ Bᵀ`` for one stored in×out. The tie
walks over blocks of rows that fit a core's cache, so it needs no temporary of the weight's size, and it
measures the rounding while the rows are at hand.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic", "compensated")
#: what a link may record: how it was rounded or, on a quantised layer, what was done instead
RECORDED = (*ROUNDINGS, "stack", "requantize")
TIEABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Elements per block. On a CPU five fp32 buffers of a block stay within 1.3 MB, i.e. in the second-level cache and
# under 5 % of a 4096² bf16 weight; an accelerator wants few launches, so a block there is 1/64 of the weight.
_CPU_BLOCK = 1 << 16


class KnotError(RuntimeError):
    """A knot that must not be tied, or an invariant of one that does not hold; the message names the layer."""


@dataclass(frozen=True)
class Tie:
    """What one tie did to one weight (Frobenius norms, in the weight's own units).

    Attributes:
        delta: ``‖s·L R‖``, the norm of the update that was asked for.
        lost: norm of the part of the update that is neither in the weight nor in the residual buffer.
        deviation: ``‖W' − (W + s·L R)‖`` (with the old residual counted as part of W): how far the stored
            weight is from the exact sum. Equals ``lost`` unless rounding is compensated.
        weight: ``‖W'‖``.
    """

    delta: float
    lost: float
    deviation: float
    weight: float


def key(seed: int, *path: object) -> int:
    """Map ``(seed, link, layer, …)`` to a 63-bit seed: the same on every machine, process and device."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def delta_norm(left: Tensor, right: Tensor, scaling: float) -> float:
    """``‖s·L R‖_F`` from the r×r Gram matrices alone, in float64; ``left`` m×r, ``right`` r×n."""
    left, right = left.double(), right.double()
    square = torch.sum((left.T @ left) * (right @ right.T)).item()
    return abs(scaling) * math.sqrt(max(square, 0.0))


def residual_like(weight: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """A zero residual buffer for compensated ties of ``weight``.

    A half-precision weight gets a bf16 residual: residuals lie ``2⁻⁸`` to ``2⁻¹¹`` below the weight, where fp16 has
    run out of exponents. fp32 and fp64 weights get one of their own dtype.
    """
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return torch.zeros(weight.shape, dtype=torch.bfloat16 if half else weight.dtype, device=device)


@torch.no_grad()
def obstacle(weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> str | None:
    """Why tying would leave a value that is not finite, as the rest of a sentence on the layer; None if it would not.

    Reads the weight, writes nothing. The sum must not exceed the dtype's largest number: then both of its neighbours
    are finite, whichever the rounding takes.
    """
    limit = torch.finfo(weight.dtype).max
    low, high = (value.item() for value in torch.aminmax(weight))
    if not math.isfinite(low) or not math.isfinite(high):
        return f"has a weight with non-finite values ({low:g} to {high:g})"
    rows = torch.linalg.vector_norm(left.double(), dim=1).max().item()
    columns = torch.linalg.vector_norm(right.double(), dim=0).max().item()
    if max(-low, high) + abs(scaling) * rows * columns <= limit:  # |(L R)_ij| ≤ ‖L_i‖‖R_j‖
        return None
    compute = _compute_dtype(weight)
    scaled, right = left.to(compute) * scaling, right.to(compute)
    for block in _blocks((weight.shape[0], weight.shape[1]), weight.device):
        target = torch.addmm(weight[block].to(compute), scaled[block], right)
        if not target.abs().amax() <= limit:
            return f"would get a W + sBA beyond {limit:g}, the largest number of {weight.dtype}"
    return None


@torch.no_grad()
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
        seed: of the stochastic rounding; the draws depend on it and on the position in W only.
        residual: buffer from `residual_like`, on any device; needed when compensated, changed in place.
        part_of: shape of the whole weight of which ``weight`` is a part; None if it is whole. A part is rounded as it
            would be within the whole.
        offset: where the part begins.

    Returns:
        The norms of the update and of what rounding did to it.

    Raises:
        ValueError: unknown rounding, or a missing residual.

    Half-precision weights are summed in fp32 and rounded once; fp32 and fp64 ones are summed in their own precision,
    where the rounding error of the one addition is recovered exactly (Knuth's two-sum).

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
    compute = _compute_dtype(weight)
    scaled = left.to(device=weight.device, dtype=compute) * scaling
    right = right.to(device=weight.device, dtype=compute)
    exact_type = weight.dtype == compute
    squares = torch.zeros(3, dtype=torch.float64, device=weight.device)
    whole, top = part_of or (weight.shape[0], weight.shape[1]), offset[0]
    columns = slice(offset[1], offset[1] + weight.shape[1])
    for number, span in enumerate(_blocks(whole, weight.device)):
        inside = slice(max(span.start, top) - span.start, min(span.stop, top + weight.shape[0]) - span.start)
        if inside.start >= inside.stop:
            continue
        rows = slice(inside.start + span.start - top, inside.stop + span.start - top)
        block = weight[rows]
        noise = None
        if rounding == "stochastic":
            noise = _Noise(weight.device, key(seed, number), (span.stop - span.start, whole[1]), (inside, columns))
        kept = None if residual is None else residual[rows].to(device=weight.device, dtype=compute)
        if exact_type:
            new, error = _sum_in_own_precision(block, torch.mm(scaled[rows], right), kept, noise)
        else:
            target = torch.addmm(block.to(compute), scaled[rows], right)
            if kept is not None:
                target += kept
            new = _round_stochastically(target, weight.dtype, noise) if noise else target.to(weight.dtype)
            error = target.sub_(new)
        lost = error
        if residual is not None:
            stored = error.to(residual.dtype)
            residual[rows].copy_(stored)
            lost = error - stored
        block.copy_(new)
        squares[0] += torch.linalg.vector_norm(lost, dtype=torch.float64) ** 2
        squares[1] += torch.linalg.vector_norm(error, dtype=torch.float64) ** 2
        squares[2] += torch.linalg.vector_norm(new, dtype=torch.float64) ** 2
    lost_norm, deviation, weight_norm = squares.sqrt().tolist()
    return Tie(delta_norm(left, right, scaling), lost_norm, deviation, weight_norm)


def tolerance(weight: Tensor, tie: Tie, rank: int) -> float:
    """The largest deviation that rounding alone can explain.

    Each stored value is within one unit in the last place of its target (half a unit when rounded to nearest), so
    ``‖W' − target‖ ≤ eps·‖W'‖`` plus one smallest subnormal per element; the dot products of length r add
    ``r·eps`` of the compute dtype, relative to the update.
    """
    info, compute = torch.finfo(weight.dtype), torch.finfo(_compute_dtype(weight))
    subnormal = info.smallest_normal * info.eps * math.sqrt(weight.numel())
    return info.eps * tie.weight + subnormal + 2 * (rank + 2) * compute.eps * (tie.delta + tie.weight)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _blocks(shape: tuple[int, int], device: torch.device) -> Iterator[slice]:
    rows, columns = shape
    elements = _CPU_BLOCK if device.type == "cpu" else max(_CPU_BLOCK, rows * columns // 64)
    height = max(1, elements // max(1, columns))
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


class _Noise:
    """Uniform draws of one block (or a part of it), reproducible from its seed on one device."""

    def __init__(self, device: torch.device, seed: int, shape: tuple[int, int], part: tuple[slice, slice]) -> None:
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.shape, self.part = shape, part

    def integers(self, like: Tensor, bits: int) -> Tensor:
        draws = torch.randint(0, 1 << bits, self.shape, generator=self.generator, dtype=torch.int32, device=like.device)
        return draws[self.part]

    def uniform(self, like: Tensor) -> Tensor:
        return torch.rand(self.shape, generator=self.generator, dtype=like.dtype, device=like.device)[self.part]


def _sum_in_own_precision(
    old: Tensor, update: Tensor, kept: Tensor | None, noise: _Noise | None
) -> tuple[Tensor, Tensor]:
    """``old + update (+ kept)`` rounded once, and the exact remainder (two-sum: old + update = new + error)."""
    if kept is not None:
        update = update + kept
    new = old + update
    shadow = new - old
    error = (old - (new - shadow)) + (update - shadow)
    if noise is not None:
        # the exact sum lies between `new` and its neighbour on the error's side, at |error| of their distance
        neighbour = torch.nextafter(new, torch.where(error > 0, torch.inf, -torch.inf).to(new.dtype))
        gap = neighbour - new
        chance = torch.where(error == 0, torch.zeros_like(error), error / gap)
        up = noise.uniform(new) < chance
        error = torch.where(up, error - gap, error)
        new = torch.where(up, neighbour, new)
    return new, error


def _round_stochastically(target: Tensor, dtype: torch.dtype, noise: _Noise) -> Tensor:
    """Round fp32 to bf16 or fp16 at random, without bias.

    Seen as an integer, an fp32 number is sign, exponent and mantissa in order of weight. Adding a uniform integer below
    ``2^d``, where d is the number of mantissa bits to be dropped, carries into the kept bits with probability
    equal to the dropped fraction; clearing the d bits then leaves one of the two neighbours. bf16 shares fp32's
    exponents (d = 16). fp16 drops 13 bits where it is normal; below ``2⁻¹⁴`` its grid is uniform with step ``2⁻²⁴``.
    """
    if dtype == torch.bfloat16:
        return _carry(target, noise.integers(target, 16), 16).to(dtype)
    draws = noise.integers(target, 13)
    normal = _carry(target, draws, 13)
    subnormal = torch.floor(target * 2.0**24 + draws * 2.0**-13) * 2.0**-24
    return torch.where(target.abs() < 2.0**-14, subnormal, normal).to(dtype)


def _carry(target: Tensor, draws: Tensor, bits: int) -> Tensor:
    return (target.view(torch.int32) + draws).bitwise_and_(-(1 << bits)).view(torch.float32)
