"""How a link starts: the values of A and B before its first step.

An init is a function of a `LinkStart`. It returns A (r×in), which leaves B zero, or a pair (A, B).
``LinkConfig(init=...)`` takes such a function, or the name of one in `INITS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cola.common.contexts import unaffected
from cola.knot.tie import key

#: A (r×in) and B (out×r) of one layer
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LinkStart:
    """The argument of an init: one layer of one link.

    In a distributed run every process asks the function, and it must return the same on all of them. A pair (A, B)
    needs checkpoints that keep all of the optimizer's state dict, which `torch.distributed.checkpoint` does not.

    Attributes:
        path: the layer's path.
        shape: (out, in) of its weight.
        rank: the rank r.
        scaling: the scale s.
        link: index of the link, from 0.
        part: name of the part (``LinkConfig(parts=...)``), whose rows are then those of ``shape``; None for a layer.
        expert: which of the weight's matrices, where it holds several (fused experts); each is asked for by itself.
        generator: a CPU generator seeded by (seed, link, path), so that equal keys draw equal values everywhere.
        opt: the `ChainOptimizer`, which still carries the previous link; None for the first link. At a knot its factors
            have the gradients of the last step. `ChainOptimizer.follow` and `ChainOptimizer.undo` begin links without.
    """

    path: str
    shape: tuple[int, ...]
    rank: int
    scaling: float
    link: int
    generator: torch.Generator
    opt: Any = None
    expert: int | None = None
    part: str | None = None


Init = Callable[[LinkStart], Tensor | Pair]

#: draws ignore the caller's default device and dtype
_PLAIN: Any = {"device": "cpu", "dtype": torch.float32}


def _gaussian(start: LinkStart) -> Tensor:
    """N(0, 1/r²), as in PEFT."""
    return torch.randn(start.rank, start.shape[1], generator=start.generator, **_PLAIN) / start.rank


def _kaiming(start: LinkStart) -> Tensor:
    """U(−1/√in, 1/√in), as `nn.Linear` and PEFT draw."""
    width = start.shape[1]
    return (2 * torch.rand(start.rank, width, generator=start.generator, **_PLAIN) - 1) / math.sqrt(width)


def _orthogonal(start: LinkStart) -> Tensor:
    """Orthonormal rows."""
    draws = torch.randn(start.shape[1], start.rank, generator=start.generator, **_PLAIN)
    q, upper = torch.linalg.qr(draws)
    return (q * torch.sign(torch.diagonal(upper))).t().contiguous()


def _selector(start: LinkStart) -> Tensor:
    """r input coordinates, shifted by r at every link."""
    rows = torch.arange(start.rank, device="cpu")
    columns = (rows + start.link * start.rank) % start.shape[1]
    return torch.zeros(start.rank, start.shape[1], **_PLAIN).index_put_((rows, columns), torch.ones((), **_PLAIN))


def _two_sided(start: LinkStart) -> Pair:
    """Both factors orthonormal times a half, so that each has a gradient from the first step on."""
    A, B = _orthogonal(start), _orthogonal(replace(start, shape=start.shape[::-1])).t().contiguous()
    return A / 2, B / 2


INITS: dict[str, Init] = {
    "gaussian": _gaussian,
    "kaiming": _kaiming,
    "orthogonal": _orthogonal,
    "selector": _selector,
    "two-sided": _two_sided,
}
#: names of inits that return pairs
PAIRS = ("two-sided",)


def generator(seed: int, link: int, path: str) -> torch.Generator:
    """The generator for one layer of one link."""
    return torch.Generator("cpu").manual_seed(key(seed, link, path))


@torch.no_grad()
@unaffected()
def draw(
    init: str | Init, train: str, start: LinkStart, dtype: torch.dtype = torch.float32, *, looks_up: bool = False
) -> Pair:
    """Draw the first values of a link's factors, on the CPU.

    Args:
        init: a name in `INITS`, or a function.
        train: as in `LinkConfig`. With ``"A"`` a named init that returns one factor draws B and leaves A zero.
        start: the function's argument.
        dtype: of the Parameters that they are for.
        looks_up: the layer is an embedding. With ``train="both"`` a named init then draws B and leaves A zero, so that
            tokens that training does not meet keep their rows; "kaiming" draws N(0, 1), as PEFT does.

    A shape of (E, out, in) makes E draws, one after the other.

    Returns:
        A and B: in fp32 from a named init, copies in ``dtype`` from a function. One of them is zero, unless a function
        returned a pair.

    Raises:
        TypeError: the function returned neither a tensor nor a pair of tensors.
        ValueError: a tensor has a wrong shape, or values that are not finite in ``dtype``, or the function returned A
            alone with train="A".
    """
    if len(start.shape) > 2:
        count, *shape = start.shape
        pairs = [draw(init, train, replace(start, shape=tuple(shape), expert=e), dtype) for e in range(count)]
        return torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])
    out, inner = start.shape
    if isinstance(init, str):
        draws_B = (train == "A" or (looks_up and train == "both")) and init not in PAIRS
        if draws_B and looks_up and init == "kaiming":
            drawn: Any = torch.randn(start.rank, out, generator=start.generator, **_PLAIN)
        else:
            drawn = INITS[init](replace(start, shape=(inner, out)) if draws_B else start)
        if isinstance(drawn, tuple):
            return drawn
        if draws_B:
            return torch.zeros(start.rank, inner, **_PLAIN), drawn.t().contiguous()
        return drawn, torch.zeros(out, start.rank, **_PLAIN)
    name = f"init={getattr(init, '__name__', init)!s:.60}"
    made = init(start)
    if isinstance(made, Tensor) and train == "A":
        raise ValueError(f"{name} returned A alone, and train='A' needs a pair (A, B), with B frozen and not zero")
    pair = (made, torch.zeros(out, start.rank, **_PLAIN)) if isinstance(made, Tensor) else made
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(x, Tensor) for x in pair)):
        raise TypeError(f"{name} returned a {type(made).__name__} for {start.path!r}: return A, or a pair (A, B)")
    A, B = (factor.detach().cpu() for factor in pair)
    fits = A.shape == (start.rank, inner) and B.shape == (out, start.rank)
    if not (fits and A.is_floating_point() and B.is_floating_point()):
        raise ValueError(
            f"{name} returned A {tuple(A.shape)} of {A.dtype} and B {tuple(B.shape)} of {B.dtype} for {start.path!r}: "
            f"A must be {start.rank}×{inner} and B {out}×{start.rank}, of floating-point numbers"
        )
    A, B = A.to(dtype, copy=True), B.to(dtype, copy=True)  # they may be views of what a knot is about to change
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise ValueError(f"{name} returned values that are not finite in {dtype} for {start.path!r}")
    return A, B
