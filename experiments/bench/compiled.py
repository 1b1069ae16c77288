"""A compiled tie: the same arithmetic in one fused loop by torch.compile, and the time of its compilation.

The library ties without a compiler; this measurement is the reason.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from cola.knot.tie import tie_
from experiments.bench.measure import Row, Settings, medians, race, ratio

RANK = 8
COMPILERS = ("g++", "clang++", "c++")


def cases() -> Iterator[tuple[str, object]]:
    """Name and function of each group of rows."""
    for dtype in ("fp32", "bf16"):
        yield f"compiled/{dtype}", partial(rows, dtype)


def rows(dtype: str, settings: Settings) -> Iterator[Row]:
    """Time to ``W.add_`` of a tie compiled for its shape; needs a C++ compiler."""
    if not any(map(shutil.which, COMPILERS)):
        warnings.warn(f"compiled/{dtype} is left out: it needs one of {', '.join(COMPILERS)} on the PATH", stacklevel=2)
        return
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    size = 64 if settings.smoke else 4096
    g = settings.generator()
    weight = torch.randn(size, size, generator=g).to(kind)
    other = (torch.randn(size, size, generator=g) * 1e-6).to(kind)
    left, right = torch.randn(size, RANK, generator=g) * 1e-6, torch.randn(RANK, size, generator=g)
    tie: Callable[[Tensor, Tensor, Tensor], object] = torch.compile(fused, fullgraph=True, dynamic=False)
    copy, twin = weight.clone(), weight.clone()
    started = time.perf_counter()
    tie(copy, left, right)
    compiling = time.perf_counter() - started
    tie_(twin, left, right, 1.0)
    differ = (copy != twin).double().mean().item()
    times = race(
        {
            "add_": lambda: weight.add_(other),
            "compiled": lambda: tie(weight, left, right),
            "tie": lambda: tie_(weight, left, right, 1.0),
        },
        settings,
    )
    saved = (times["tie"] - times["compiled"]).mean()
    yield Row(
        f"compiled/{dtype}", f"tie by torch.compile, {dtype} {size}×{size}, nearest: time to W.add_",
        ratio(times, "compiled", "add_"), limit=2 / 3, limited_by="bandwidth, as for tie",
        between="r products per element without blocking in registers; the code for bf16's bits is not vectorised",
        right=differ < 1e-2,  # the products are summed in another order, which seldom changes a rounding
        details=medians(times) | {"compile_s": compiling, "pays_after_ties": compiling / saved if saved > 0 else -1.0},
    )  # fmt: skip


def fused(weight: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``W ← round(W + L R)``, with the sums of squares per row of the loss and of the new weight."""
    update = left[:, 0:1] * right[0]
    for k in range(1, left.shape[1]):
        update = update + left[:, k : k + 1] * right[k]
    if weight.dtype == torch.float32:
        new = weight + update
        lost = update + (weight - new)
    else:  # round to nearest even by bits: the compiler may drop a cast to bf16 and back
        target = weight.float() + update
        bits = target.view(torch.int32)
        new = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).view(torch.float32)
        lost = target - new
    weight.copy_(new)
    return lost.square().sum(1), new.square().sum(1)
