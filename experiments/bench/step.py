"""Training steps against PEFT with AdamW, and what `ChainOptimizer.step` adds to its base's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cola import ChainOptimizer, LinkConfig, NeverKnots
from experiments.bench import models
from experiments.bench.measure import Row, Settings, Spread, medians, race, ratio

LR = 1e-4


def cases() -> Iterator[tuple[str, object]]:
    """Name and function of each group of rows."""
    for name in models.MODELS:
        yield f"step/{name}", partial(training, f"step/{name}", name)
    yield "overhead", overhead


def training(name: str, key: str, settings: Settings) -> Iterator[Row]:
    """A whole step: forward, backward, update, gradients set to None."""
    words, make, sequences, tokens = models.MODELS[key]
    if settings.smoke:
        sequences, tokens = 1, 8
    steps = contenders(make, sequences, tokens, settings)
    losses = [(steps["cola"]().item(), steps["peft"]().item()) for _ in range(3)]
    right = all(abs(a - b) <= 1e-3 * abs(b) for a, b in losses)  # both are trained: three equal steps
    times = race(steps, settings)
    yield Row(
        name, f"training step, {words}, {sequences}×{tokens} tokens, fp32: time to PEFT's with AdamW",
        ratio(times, "cola", "peft"), 0.95, limit=ratio(times, "frozen", "peft").median,
        limited_by="the model's own forward and backward to the first adapted layer, measured in the same run",
        between="the links' products in q and v, and AdamW's step", right=right, beside=medians(times),
    )  # fmt: skip


def contenders(make: Any, sequences: int, tokens: int, settings: Settings) -> dict[str, Callable[[], Tensor]]:
    """Steps, returning the loss, of a chain and of PEFT from the same weights and factors; and of neither."""
    import peft

    mine = make(settings.smoke)
    other, frozen = copy.deepcopy(mine), copy.deepcopy(mine).requires_grad_(False)
    ids = models.batch(mine, sequences, tokens, settings.generator())
    link = LinkConfig(r=8, lora_alpha=16, target_modules=models.TARGETS)
    opt = ChainOptimizer(torch.optim.AdamW, mine, NeverKnots(), link=link, lr=LR)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=models.TARGETS)
    adapted = peft.get_peft_model(other, config)
    factors = {n: p for n, p in mine.named_parameters() if "lora_A" in n}
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_A" in name:
                p.copy_(factors[name.removeprefix("base_model.model.").replace(".default.weight", "")])
    base = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=LR)
    # a frozen model that is differentiated as far down as an adapted one, and has nothing to update
    first = {t: next(m for n, m in frozen.named_modules() if n.endswith(t)) for t in models.TARGETS}
    for module in first.values():
        module.register_forward_hook(lambda module, args, output: output.requires_grad_())

    def run(model: Any, optimizer: Any) -> Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    for model in (mine, adapted, frozen):
        model.train()
    return {
        "cola": partial(run, mine, opt),
        "peft": partial(run, adapted, base),
        "frozen": partial(run, frozen, None),
    }


def overhead(settings: Settings) -> Iterator[Row]:
    """`step()` without a knot over `base.step()`, on the factors of OPT-125M, and how often each waits."""
    layers, width = (2, 16) if settings.smoke else (24, 768)
    model = models.stack(layers, width)
    link = LinkConfig(r=8, target_modules="all-linear")
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
        beside=medians(times),
    )  # fmt: skip
    counts = []
    for run in (opt.step, opt.base.step):
        with Reads() as reads:
            run()
        counts.append(reads.count)
    yield Row(
        "overhead/waits", "device values that step() reads on the host beyond those that base.step() reads",
        Spread.of([counts[0] - counts[1]]), 0.0, limit=0.0, limited_by="the policy needs no value between knots",
        beside={"step": counts[0], "base": counts[1]},
    )  # fmt: skip


class Reads(TorchDispatchMode):
    """Counts operations that make the host wait for a value: each would stop an accelerator's queue."""

    waiting = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0] in self.waiting
        return func(*args, **(kwargs or {}))
