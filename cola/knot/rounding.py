"""Rounds ``W + s·BA`` once: exact remainders of a sum, and unbiased stochastic rounding."""

from typing import Any

import torch
from torch import Tensor

_TILE = 1 << 16  # elements that share one table of noise; stored chains depend on it


class Noise:
    """Uniform integers that depend only on the seed and on the position in the whole weight.

    ``u_ij = T[i mod h, j] xor c_i`` for a table T of h×n draws, where h is ``2¹⁶ div n`` between 1 and m, and a draw c
    per row. Any two u are independent (T and c are uniform, and xor with a uniform number is uniform). So each rounding
    is unbiased, and sums of roundings vary as with fresh draws, for a few thousandths of the draws.

    Args:
        weight: the part to round.
        seed: seed of T and then c.
        shape: shape of the whole weight.
        offset: where the part begins.
        height: rows per block.
    """

    def __init__(self, weight: Tensor, seed: int, shape: tuple[int, int], offset: tuple[int, int], height: int) -> None:
        (rows, columns), (top, left) = shape, offset
        generator = torch.Generator(device=weight.device).manual_seed(seed)
        self.bits = NOISE_BITS[weight.dtype]
        tall = max(1, min(rows, _TILE // max(1, columns)))
        draws: Any = {"generator": generator, "dtype": torch.int32, "device": weight.device}
        table = torch.randint(0, 1 << self.bits, (tall, columns), **draws)[:, left : left + weight.shape[1]]
        self.rows = torch.randint(0, 1 << self.bits, (rows, 1), **draws)[top : top + weight.shape[0]]
        self.tall, self.top = tall, top
        if weight.device.type != "cpu":  # repeat the table, so that one launch serves a whole block
            table = table.repeat(-(-(height + tall) // tall), 1)
        self.table = table

    def integers(self, rows: slice, out: Tensor) -> Tensor:
        """Write the draws of some rows of the part, below ``2^bits``, into an int32 tensor."""
        done, count = 0, rows.stop - rows.start
        while done < count:
            start = (self.top + rows.start + done) % self.tall
            piece = min(count - done, self.table.shape[0] - start)
            own = self.rows[rows.start + done : rows.start + done + piece]
            torch.bitwise_xor(self.table[start : start + piece], own, out=out[done : done + piece])
            done += piece
        return out

    def uniform(self, rows: slice, out: Tensor) -> Tensor:
        """`integers`, scaled to [0, 1)."""
        draws = self.integers(rows, torch.empty(out.shape, dtype=torch.int32, device=out.device))
        # integers times a number would be computed in the caller's default dtype
        return torch.mul(draws.to(torch.float32), 2.0**-self.bits, out=out)


# half precision: the mantissa bits that fp32 has in addition; else the resolution of the probability of a move
NOISE_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 24, torch.float64: 31}


def sum_in_own_precision(old: Tensor, update: Tensor, new: Tensor, spare: Tensor) -> Tensor:
    """``new ← old + update``, rounded once; returns the exact remainder, in place of ``update``.

    Knuth's two-sum: ``old + update = new + ((old − (new − shadow)) + (update − shadow))``, ``shadow = new − old``.
    """
    torch.add(old, update, out=new)
    shadow = torch.sub(new, old, out=spare)
    update -= shadow
    torch.sub(new, shadow, out=spare)
    torch.sub(old, spare, out=spare)
    update += spare
    return update


def sum_and_measure(old: Tensor, update: Tensor, new: Tensor) -> Tensor:
    """`sum_in_own_precision` in two operations, not five, for a remainder that is only measured; overwrites ``old``.

    ``update + (old − new)`` is the exact remainder where ``|update| ≤ |old|`` (Dekker's fast two-sum). Elsewhere it is
    off by the rounding of ``old − new``, so its norm is off by at most ``eps/2·‖update‖`` over those entries.
    """
    torch.add(old, update, out=new)
    old -= new
    update += old
    return update


def move_to_neighbour(new: Tensor, error: Tensor, uniform: Tensor) -> None:
    """Move ``new`` to its neighbour on the error's side with probability |error| / distance. Changes both arguments.

    The exact sum ``new + error`` lies between the two, so the expectation is exact.
    """
    neighbour = torch.nextafter(new, torch.where(error > 0, torch.inf, -torch.inf).to(new.dtype))
    gap = neighbour - new
    moves = uniform < torch.where(error == 0, torch.zeros_like(error), error / gap)
    error.copy_(torch.where(moves, error - gap, error))
    new.copy_(torch.where(moves, neighbour, new))


def round_stochastically(
    target: Tensor, new: Tensor, spare: Tensor, noise: Noise, rows: slice, dtype: torch.dtype
) -> None:
    """Round fp32 to bf16 or fp16 at random, without bias, and write the result to ``new``, in fp32.

    The bits of an fp32 number are sign, exponent and mantissa, in order of weight. To drop d mantissa bits, add a
    uniform integer below ``2^d``: it carries into the kept bits with probability equal to the dropped fraction.
    Clearing the d bits then leaves one of the two neighbours. bf16 has fp32's exponents (d = 16). fp16 drops 13 bits
    where it is normal; below ``2⁻¹⁴`` its grid is uniform with step ``2⁻²⁴``.
    """
    draws = noise.integers(rows, spare.view(torch.int32))
    torch.add(target.view(torch.int32), draws, out=new.view(torch.int32)).bitwise_and_(-(1 << noise.bits))
    if dtype == torch.float16:
        subnormal = torch.floor(target * 2.0**24 + draws.to(target.dtype) * 2.0**-13) * 2.0**-24
        new.copy_(torch.where(target.abs() < 2.0**-14, subnormal, new))
