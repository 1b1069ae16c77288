"""One adapted linear layer, forward and backward, against PEFT's, loralib's and the frozen layer."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cola import ChainOptimizer, LinkConfig, NeverKnots
from experiments.bench.measure import Row, Settings, Spread, Work, medians, race, ratio, saved_bytes

RANK = 8
SHAPES = ("1024x768", "2048x2048", "512x4096")  # tokens and width
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DROPOUT = 0.1
TO_PEFT = {("fp32", "1024x768", 0.0): 0.92}
TO_FROZEN = {("fp32", "1024x768"): 1.12, ("fp32", "2048x2048"): 1.11, ("bf16", "2048x2048"): 1.06}
BETWEEN = (
    "products with a side of 8 run at bandwidth, not at the arithmetic peak: x and the gradient are read twice more, "
    "the output and dx are read and written once more; the floor is the frozen layer and these products alone, without "
    "autograd, into buffers that are reused"
)


def cases() -> Iterator[tuple[str, object]]:
    """Name and function of each group of rows."""
    for dtype in DTYPES:
        for shape in SHAPES:
            for dropout in (0.0, DROPOUT):
                name = f"layer/{dtype}/{shape}" + ("/dropout" if dropout else "")
                yield name, partial(rows, name, dtype, shape, dropout)


def rows(name: str, dtype: str, shape: str, dropout: float, settings: Settings) -> Iterator[Row]:
    """Time to PEFT's and to the frozen layer's; bytes saved for backward."""
    tokens, d = (64, 32) if settings.smoke else map(int, shape.split("x"))
    layers = contenders(d, DTYPES[dtype], dropout, settings)
    g = settings.generator()
    x = torch.randn(tokens, d, generator=g).to(settings.device, DTYPES[dtype]).requires_grad_()
    upstream = torch.randn(tokens, d, generator=g).to(settings.device, DTYPES[dtype])
    right = agree(layers, x, upstream)
    work: dict[str, Work] = {key: partial(train, layer, x, upstream) for key, layer in layers.items()}
    layer: Any = layers["cola"].proj
    bare = products(x.detach(), upstream.clone(), layer.lora_A.detach(), layer.lora_B.detach())

    def floor() -> None:
        work["frozen"]()
        bare()

    times = race({**work, "floor": floor}, settings)
    words = f"{dtype}, {tokens}×{d}" + (f", dropout {dropout}" if dropout else "")
    details = medians(times)
    if "loralib" in layers:
        details["to_loralib"] = ratio(times, "cola", "loralib").median
    yield Row(
        f"{name}/peft", f"layer, {words}: time to PEFT's", ratio(times, "cola", "peft"),
        TO_PEFT.get((dtype, shape, dropout), 1.0), right=right, details=details,
        limited_by="no bound: both do the same products",
    )  # fmt: skip
    yield Row(
        f"{name}/frozen", f"layer, {words}: time to the frozen one's", ratio(times, "cola", "frozen"),
        None if dropout or settings.gpu else TO_FROZEN.get((dtype, shape)), limit=1 + 3 * RANK / d,
        limited_by="FLOPs: 12·tokens·r·d on top of 4·tokens·d², 1 + 3r/d", between=BETWEEN, right=right,
        floor=ratio(times, "floor", "frozen"), details={"peft": ratio(times, "peft", "frozen").median},
    )  # fmt: skip
    saved = {key: saved_bytes(layer, x) for key, layer in layers.items()}
    yield Row(
        f"{name}/saved", f"layer, {words}: bytes saved for backward, to PEFT's",
        Spread.of([saved["cola"] / saved["peft"]]), 1.0,
        limit=tokens * d * x.element_size() / saved["peft"], limited_by="the input itself (dA needs it)",
        between="x Aᵀ, tokens × r" + ("; the mask is drawn again from its seed" if dropout else ""),
        details={f"{key}_bytes": float(value) for key, value in saved.items()},
    )  # fmt: skip


def products(x: Tensor, y: Tensor, A: Tensor, B: Tensor, wants_dx: bool = True) -> Work:
    """Only the six products that a link adds to a frozen layer; five if the input needs no gradient.

    A and B are zero, so that the values do not change, however often it runs.

    Args:
        x: tokens×in, copied: stands for the input and for its gradient.
        y: tokens×out, overwritten: stands for the output and for its gradient.
        A, B: of the link.
        wants_dx: whether the input needs a gradient.
    """
    A, B = torch.zeros_like(A, dtype=x.dtype), torch.zeros_like(B, dtype=x.dtype)
    x, (tokens, r) = x.clone(), (x.shape[0], A.shape[0])
    h, dA, dB = x.new_zeros(tokens, r), torch.empty_like(A), x.new_empty(r, B.shape[0])

    @torch.no_grad()
    def run() -> None:
        torch.mm(x, A.t(), out=h)
        y.addmm_(h, B.t())
        torch.mm(h.t(), y, out=dB)
        torch.mm(y, B, out=h)
        torch.mm(h.t(), x, out=dA)
        if wants_dx:
            x.addmm_(h, A)

    return run


def contenders(d: int, dtype: torch.dtype, dropout: float, settings: Settings) -> dict[str, nn.Module]:
    """The frozen layer and the adapted ones, with the same weights and factors; loralib's where it is installed."""
    g = settings.generator()
    weight, bias = torch.randn(d, d, generator=g) / d**0.5, torch.randn(d, generator=g)
    A, B = torch.randn(RANK, d, generator=g) / RANK, torch.randn(d, RANK, generator=g) * 0.01

    def plain() -> nn.Sequential:
        layer = nn.Linear(d, d, dtype=dtype, device=settings.device)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        return nn.Sequential(OrderedDict(proj=layer)).requires_grad_(False)

    found: dict[str, nn.Module] = {"frozen": plain(), "cola": plain(), "peft": plain()}
    ChainOptimizer(
        torch.optim.SGD, found["cola"], NeverKnots(),
        link=LinkConfig(r=RANK, target_modules=["proj"], lora_dropout=dropout), lr=0.0,
    )  # fmt: skip
    import peft

    # when injected, PEFT's factors have the weight's dtype, which is faster for bf16
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["proj"], lora_dropout=dropout)
    found["peft"] = peft.inject_adapter_in_model(config, found["peft"])
    try:
        import loralib
    except ImportError:
        pass
    else:
        layer = loralib.Linear(d, d, r=RANK, lora_alpha=16, lora_dropout=dropout, merge_weights=False)
        layer.to(settings.device, dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        layer.bias.requires_grad_(False)
        found["loralib"] = nn.Sequential(OrderedDict(proj=layer))
    with torch.no_grad():
        for name, parameter in (p for module in found.values() for p in module.named_parameters()):
            if "lora_A" in name:
                parameter.copy_(A)
            elif "lora_B" in name:
                parameter.copy_(B)
    for module in found.values():
        module.train()
    return found


def train(layer: nn.Module, x: Tensor, upstream: Tensor) -> None:
    """Forward and backward, with the input's gradient, as inside a model."""
    x.grad = None
    layer.zero_grad()
    layer(x).backward(upstream)


def agree(layers: dict[str, nn.Module], x: Tensor, upstream: Tensor) -> bool:
    """Whether all adapted layers give the same outputs and gradients, without dropout, within the dtype's rounding."""
    results: list[list[Tensor]] = []
    for key, layer in layers.items():
        if key != "frozen":
            layer.eval()
            x.grad = None
            layer.zero_grad()
            y = layer(x)
            y.backward(upstream)
            assert x.grad is not None
            factors = [p.grad.double() for p in layer.parameters() if p.grad is not None]
            results.append([y.detach().double(), x.grad.double(), *factors])
            layer.train()
    eps = torch.finfo(x.dtype).eps
    # sums of d and of tokens terms, rounded to the dtype at most three times; errors of random sign add as roots
    return all(
        len(a) == len(b) and all((s - t).norm() <= 8 * eps * t.norm() for s, t in zip(a, b))
        for a, b in itertools.pairwise(results)
    )
