"""Layers that read their weight, forward and backward, against PEFT's: experts, embedding, Conv2d; a tie of experts."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cola import ChainOptimizer, LinkConfig, NeverKnots
from cola.knot.sharded import tie_anywhere
from experiments.bench.layer import RANK, train
from experiments.bench.measure import Row, Settings, Spread, Work, medians, peak_bytes, race, ratio

#: the ways in which transformers computes experts
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
#: experts, and the shape of each, in the row of ties
STACK = (64, 1408, 2048)
TO_ADD = 3.0
#: layer, inputs, and names of its parameters if these carry the links
Case = tuple[nn.Module, Tensor, list[str]]


def cases() -> Iterator[tuple[str, object]]:
    """Name and function of each group of rows."""
    made: dict[str, Callable[[Settings], Case]] = {
        **{f"experts/{way}": partial(experts, way) for way in IMPLEMENTATIONS},
        "embedding": embedding,
        "conv2d": conv2d,
    }
    for kind, make in made.items():
        yield f"kinds/{kind}", partial(rows, kind, make)
    yield "kinds/tie", tie


def experts(way: str, settings: Settings) -> Case:
    """A block of Mixtral: a router and eight experts, of which two see each token."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    # batched_mm copies the experts of each token, and is for few
    width, tokens = (32, 16) if settings.smoke else (256, 32 if way == "batched_mm" else 512)
    config = MixtralConfig(hidden_size=width, intermediate_size=2 * width, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = way
    x = torch.randn(1, tokens, width, generator=settings.generator()).requires_grad_()
    return MixtralSparseMoeBlock(config), x, ["experts.gate_up_proj", "experts.down_proj"]


def embedding(settings: Settings) -> Case:
    """Of 32,000 tokens."""
    vocabulary, width, tokens = (64, 32, 16) if settings.smoke else (32_000, 1024, 2048)
    return nn.Embedding(vocabulary, width), torch.randint(vocabulary, (tokens,), generator=settings.generator()), []


def conv2d(settings: Settings) -> Case:
    """3×3 on eight images."""
    channels, size = (8, 5) if settings.smoke else (128, 28)
    x = torch.randn(8, channels, size, size, generator=settings.generator()).requires_grad_()
    return nn.Conv2d(channels, channels, 3, padding=1), x, []


def rows(kind: str, make: Callable[[Settings], Case], settings: Settings) -> Iterator[Row]:
    """Time to PEFT's and to the frozen layer's, and the peak of memory that both allocate."""
    if kind.startswith("experts") and not importlib.util.find_spec("transformers"):
        warnings.warn(f"kinds/{kind} is left out: it needs transformers", stacklevel=2)
        return
    layer, x, parameters = make(settings)
    layers = contenders(layer, parameters, settings)
    with torch.no_grad():
        upstream = torch.randn(layers["cola"](x).shape, generator=settings.generator())
    right = agree(layers, x, upstream)
    work: dict[str, Work] = {key: partial(train, layers[key], x, upstream) for key in ("cola", "peft")}
    if x.requires_grad:
        work["frozen"] = partial(train, layers["frozen"], x, upstream)
    times = race(work, settings)
    details = medians(times)
    if "frozen" in work:
        details |= {f"{key}_to_frozen": ratio(times, key, "frozen").median for key in ("cola", "peft")}
    words = kind.replace("/", ", ")
    yield Row(
        f"kinds/{kind}/peft", f"{words}: time to PEFT's", ratio(times, "cola", "peft"), 1.0, right=right,
        details=details, limited_by="no bound: both compute the same",
    )  # fmt: skip
    peaks = {key: float(peak_bytes(work[key])) for key in ("cola", "peft")}
    yield Row(
        f"kinds/{kind}/memory", f"{words}: peak of the memory of a forward and a backward, to PEFT's",
        Spread.of([peaks["cola"] / peaks["peft"]]), 1.01, details={f"{key}_bytes": peak for key, peak in peaks.items()},
    )  # fmt: skip


def contenders(layer: nn.Module, parameters: list[str], settings: Settings) -> dict[str, nn.Module]:
    """The frozen layer and the adapted ones, with the same weights and factors."""
    import peft

    g = settings.generator()
    with torch.no_grad():
        for parameter in layer.requires_grad_(False).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) / parameter.shape[-1] ** 0.5)
    names = ("frozen", "cola", "peft")
    found: dict[str, nn.Module] = {key: nn.Sequential(OrderedDict(proj=copy.deepcopy(layer))) for key in names}
    targets: Any = {"target_modules": [] if parameters else ["proj"], "target_parameters": parameters or None}
    ChainOptimizer(torch.optim.SGD, found["cola"], NeverKnots(), link=LinkConfig(r=RANK, **targets), lr=0.0)
    found["peft"] = peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=16, **targets), found["peft"])
    with torch.no_grad():
        for ours, theirs in zip(links(found["cola"]), links(found["peft"]), strict=True):
            ours.copy_(torch.randn(ours.shape, generator=g) / ours.shape[-1] ** 0.5)
            of_experts = ours.dim() == 3 and ours.shape[2] == RANK  # B of each, which PEFT keeps as out × (r · E)
            theirs.copy_((ours.permute(1, 2, 0) if of_experts else ours).reshape(theirs.shape))
    for module in found.values():
        module.train()
    return found


def links(module: nn.Module) -> list[nn.Parameter]:
    """The factors, A before B."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def agree(layers: dict[str, nn.Module], x: Tensor, upstream: Tensor) -> bool:
    """Whether both adapted layers give the same outputs and gradients; of the factors' gradients the norms."""
    results = []
    for key in ("cola", "peft"):
        train(layers[key], x, upstream)
        with torch.no_grad():
            y = layers[key](x)
        norms = torch.stack([p.grad.norm() for p in links(layers[key]) if p.grad is not None])
        results.append([y, norms, *([] if x.grad is None else [x.grad])])
    # sums of at most some thousand terms in fp32, in another order; errors of random sign add as roots
    limit = 2**6 * torch.finfo(torch.float32).eps
    return all((a - b).norm() <= limit * b.norm() for a, b in zip(*results, strict=True))


def tie(settings: Settings) -> Iterator[Row]:
    """The tie of a stack of experts as a multiple of ``W.add_``, and its memory."""
    stack, m, n = (4, 24, 16) if settings.smoke else STACK
    g = settings.generator()
    left, right = torch.randn(stack, m, RANK, generator=g) * 1e-3, torch.randn(stack, RANK, n, generator=g)
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        rounding = "nearest" if dtype == torch.float32 else "stochastic"
        weight = torch.randn(stack, m, n, generator=g).to(dtype)
        other = (torch.randn(stack, m, n, generator=g) * 1e-6).to(dtype)
        exact = weight[-1].double() + 1e-3 * left[-1].double() @ right[-1].double()
        run = partial(tie_anywhere, weight, left, right, 1e-3, rounding=rounding, seed=settings.seed, residual=None)
        run()
        units = 2 * torch.finfo(dtype).eps * (exact.abs() + 1e-3 * left[-1].abs() @ right[-1].abs())
        right_now = bool(((weight[-1].double() - exact).abs() <= units).all())
        times = race({"add_": partial(weight.add_, other), "tie": run}, settings)
        what = f"tie of {stack} experts of {m}×{n}, {name}, {rounding}"
        yield Row(
            f"kinds/tie/{name}", f"{what}: time to W.add_", ratio(times, "tie", "add_"), TO_ADD, limit=2 / 3,
            limited_by="bandwidth: W read and written once, where add_ moves three arrays", right=right_now,
            between="7 to 9 passes over blocks in cache, matrix by matrix", details=medians(times),
        )  # fmt: skip
        yield Row(
            f"kinds/tie/{name}/memory", f"{what}: extra memory, in W's own bytes",
            Spread.of([peak_bytes(run) / weight.nbytes]), 0.05, limit=0.0, limited_by="nothing needs to be kept",
            between="three fp32 buffers of a block, and the factors in fp32",
        )  # fmt: skip
