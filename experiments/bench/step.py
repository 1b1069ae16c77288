"""Training steps against PEFT with AdamW, and the overhead of `ChainOptimizer.step` over its base's step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cola import ChainOptimizer, LinkConfig, NeverKnots
from experiments.bench import models
from experiments.bench.layer import products
from experiments.bench.measure import Row, Settings, Spread, medians, race, ratio

LR = 1e-4
RANK = 8
#: suffix of the model's name -> adapted layers: the paper's targets, and those of QLoRA
ADAPTED: Mapping[str, list[str] | str] = {"": models.TARGETS, "/all-linear": "all-linear"}


def cases() -> Iterator[tuple[str, object]]:
    """Name and function of each group of rows."""
    for model in models.MODELS:
        for suffix, targets in ADAPTED.items():
            yield f"step/{model}{suffix}", partial(training, f"step/{model}{suffix}", model, targets)
    yield "overhead", overhead


def training(name: str, key: str, targets: list[str] | str, settings: Settings) -> Iterator[Row]:
    """A whole step: forward, backward, update, gradients set to None."""
    words, make, sequences, tokens = {**models.MODELS, **models.LARGE}[key]
    if settings.smoke:
        sequences, tokens = 1, 8
    steps = contenders(make, targets, sequences, tokens, settings)
    losses = [(steps["cola"]().item(), steps["peft"]().item()) for _ in range(3)]
    # both train, so three steps must agree
    right = all(abs(a - b) <= (2.0**-8 if settings.gpu else 1e-3) * abs(b) for a, b in losses)
    times = race(steps, settings)
    adapted = "q and v" if targets == models.TARGETS else "all linear layers"
    dtype, target = ("bf16", 1.0) if settings.gpu else ("fp32", 0.95)
    yield Row(
        name, f"training step, {words}, {adapted}, {sequences}×{tokens} tokens, {dtype}: time to PEFT's with AdamW",
        ratio(times, "cola", "peft"), target, limit=ratio(times, "frozen", "peft").median,
        floor=ratio(times, "floor", "peft"),
        limited_by="the model's own forward and backward to the first adapted layer, with nothing adapted; the floor "
        "is that, the links' products alone and a fused AdamW step",
        between="the links' products between large ones, whose data have left the caches; some 20 calls per layer",
        right=right, details=medians(times),
    )  # fmt: skip


def contenders(
    make: Any, targets: list[str] | str, sequences: int, tokens: int, settings: Settings
) -> dict[str, Callable[[], Tensor]]:
    """Steps that return the loss: of a chain and of PEFT with equal weights and factors, frozen, and the floor."""
    import peft

    mine = make(settings.smoke).to(settings.device)
    other, frozen = copy.deepcopy(mine), copy.deepcopy(mine).requires_grad_(False)
    ids = models.batch(mine, sequences, tokens, settings.generator()).to(settings.device)
    link = LinkConfig(r=RANK, lora_alpha=16, target_modules=targets)
    opt = ChainOptimizer(torch.optim.AdamW, mine, NeverKnots(), link=link, lr=LR)
    adapted = peft.get_peft_model(other, peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=targets))
    start_alike(adapted, mine)
    base = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=LR)
    layers = {n: m for n, m in mine.named_modules() if hasattr(m, "lora_A")}
    # a frozen model, differentiated as far down as an adapted one, with nothing to update
    for name in {name.rpartition(".")[2]: name for name in reversed(layers)}.values():
        frozen.get_submodule(name).register_forward_hook(lambda module, args, output: output.requires_grad_())
    for model in (mine, adapted, frozen):
        model.train()
    least = bare(layers, lambda: mine(input_ids=ids))

    def run(model: Any, optimizer: Any) -> Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def floor() -> Tensor:
        least()
        return run(frozen, None)

    return {
        "cola": partial(run, mine, opt),
        "peft": partial(run, adapted, base),
        "frozen": partial(run, frozen, None),
        "floor": floor,
    }


@torch.no_grad()
def start_alike(adapted: nn.Module, mine: nn.Module) -> None:
    """Give PEFT's model the A of a chain's live link."""
    factors = dict(mine.named_parameters())
    for name, p in adapted.named_parameters():
        if "lora_A" in name:
            p.copy_(factors[name.removeprefix("base_model.model.").replace(".default.weight", "")])


def bare(layers: Mapping[str, Any], forward: Callable[[], object]) -> Callable[[], None]:
    """The links' products alone, with separate inputs and shared outputs of the layers, and a fused AdamW step."""
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0]}))
        for name, layer in layers.items()
    ]
    forward()
    for handle in handles:
        handle.remove()
    outputs: dict[tuple[int, int], Tensor] = {}
    work = []
    for name, layer in layers.items():
        x = inputs[name].detach().flatten(0, -2)
        shape = (len(x), layer.lora_B.shape[0])
        y = outputs.setdefault(shape, x.new_zeros(shape))
        work.append(products(x, y, layer.lora_A.detach(), layer.lora_B.detach(), inputs[name].requires_grad))
    factors = [p.detach().clone().requires_grad_() for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    for p in factors:
        p.grad = torch.zeros_like(p)
    base = torch.optim.AdamW(factors, lr=LR, fused=True)

    def least() -> None:
        for run in work:
            run()
        base.step()

    return least


def overhead(settings: Settings) -> Iterator[Row]:
    """`step()` without a knot over `base.step()`, on the factors of OPT-125M, and how often each waits."""
    layers, width = (2, 16) if settings.smoke else (24, 768)
    model = models.stack(layers, width)
    link = LinkConfig(r=RANK, target_modules="all-linear")
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=link, lr=1e-6)
    g = settings.generator()
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=g)

    def ten(step: Callable[[], object]) -> None:
        for _ in range(10):
            step()

    times = race({"step": partial(ten, opt.step), "base": partial(ten, opt.base.step)}, settings)
    yield Row(
        "overhead/time", f"ChainOptimizer.step() to AdamW.step(), {2 * layers} factors of width {width}, ten in a row",
        ratio(times, "step", "base"), 1.02, limit=1.0, limited_by="the base's own step",
        between="asking whether the step is real, the policy, watching the groups' entries: Python, no kernels",
        details=medians(times),
    )  # fmt: skip
    counts = []
    for run in (opt.step, opt.base.step):
        with Reads() as reads:
            run()
        counts.append(reads.count)
    yield Row(
        "overhead/waits", "device values that step() reads on the host beyond those that base.step() reads",
        Spread.of([counts[0] - counts[1]]), 0.0, limit=0.0, limited_by="the policy needs no value between knots",
        details={"step": counts[0], "base": counts[1]},
    )  # fmt: skip


class Reads(TorchDispatchMode):
    """Counts operations that make the host wait for a value, and would stop an accelerator's queue."""

    waiting = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0] in self.waiting
        return func(*args, **(kwargs or {}))
