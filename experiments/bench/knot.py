"""Knots of a whole model, in training steps; the memory of a chain of a hundred links."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, NeverKnots
from experiments.bench import models
from experiments.bench.measure import Row, Settings, Spread


def cases() -> Iterator[tuple[str, object]]:
    """Name and function of each group of rows."""
    yield "knot", knots
    yield "chain", chain


def knots(settings: Settings, key: str = "opt-125m") -> Iterator[Row]:
    """Knots between training steps of a model, compared with PEFT's merge of the same layers."""
    words, make, *_ = {**models.MODELS, **models.LARGE}[key]
    sequences, tokens = 1, 8 if settings.smoke else 128  # a short step, so that a knot does not look cheap
    model = make(settings.smoke).to(settings.device)
    ids = models.batch(model, sequences, tokens, settings.generator()).to(settings.device)
    opt = ChainOptimizer(
        torch.optim.AdamW, model, NeverKnots(), link=LinkConfig(r=8, target_modules=models.TARGETS), lr=1e-3
    )
    model.train()
    steps, ties, first, clock = [], [], 0.0, settings.now
    after: list[float] = []

    @torch.no_grad()
    def loss_now() -> float:
        return float(model(input_ids=ids, labels=ids).loss)

    worth = 0.0
    for round_ in range(3 if settings.smoke else 8):
        for _ in range(2):
            started = clock()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            opt.step()
            opt.zero_grad()
            steps.append(clock() - started)
        before = loss_now()
        if not round_:
            worth = abs(without_link(model, loss_now) - before)
        started = clock()
        opt.tie()
        taken = clock() - started
        after.append(abs(loss_now() - before))
        first = first or taken
        if round_:
            ties.append(taken)
    step = float(np.median(steps[2:]))
    yield Row(
        f"knot/{key}" if settings.gpu else "knot/model",
        f"knot of {words}, q and v of all layers, in training steps of {sequences}×{tokens} tokens",
        Spread.of(np.array(ties) / step), 0.5, limited_by="as tie: the adapted weights read and written once",
        between="the check for overflow and the digest of the weights read them once each; drawing A",
        # relative to the effect of losing a link, to which bf16's rounding of the loss is near
        right=None if settings.gpu else max(after) < 1e-2 * worth,
        details={"step_ms": step * 1e3, "knot_ms": float(np.median(ties)) * 1e3, "first_knot_ms": first * 1e3}
        | peft_merge(make, settings),
    )  # fmt: skip


@torch.no_grad()
def without_link(model: nn.Module, measure: Callable[[], float]) -> float:
    """The value of ``measure`` while the live link is off."""
    factors = [p for name, p in model.named_parameters() if name.endswith("lora_B")]
    held = [p.clone() for p in factors]
    for p in factors:
        p.zero_()
    found = measure()
    for p, value in zip(factors, held):
        p.copy_(value)
    return found


def peft_merge(make: Callable[[bool], nn.Module], settings: Settings) -> dict[str, float]:
    """Milliseconds of `merge_adapter` on the same model."""
    import peft

    model = peft.get_peft_model(
        make(settings.smoke).to(settings.device), peft.LoraConfig(r=8, target_modules=models.TARGETS)
    )
    times, clock = [], settings.now
    for _ in range(4):
        started = clock()
        model.merge_adapter()
        times.append(clock() - started)
        model.unmerge_adapter()
    return {"peft_merge_ms": float(np.median(times[1:])) * 1e3}


def chain(settings: Settings) -> Iterator[Row]:
    """Many links on the shapes of q and v: memory outside the chain's record, and in it."""
    layers, width, links = (2, 32, 10) if settings.smoke else (8, 4096, 20) if settings.gpu else (24, 768, 100)
    others = plain_tensors()  # kept alive, so that none of them is freed in between and counted as shrinking
    model = models.stack(layers, width).to(settings.device, torch.bfloat16 if settings.gpu else torch.float32)
    opt = ChainOptimizer(
        torch.optim.AdamW, model, NeverKnots(), link=LinkConfig(r=8, target_modules="all-linear"), lr=1e-4
    )
    g = settings.generator()
    x = torch.randn(4, width, generator=g).to(settings.device, next(model.parameters()).dtype)

    def link() -> None:
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        opt.tie()

    link()
    outside, ledger = live_bytes(opt)
    allocated = on_the_gpu(settings)
    for _ in range(links - 1):
        link()
    later, grown = live_bytes(opt)
    allocated = on_the_gpu(settings) - allocated
    del others
    per_link = sum(2 * 8 * width * 4 for _ in range(layers))
    yield Row(
        "chain/device", f"chain of {links} links on {layers} layers of width {width}: growth of all tensors that are "
        "not links, in bytes", Spread.of([later - outside]), 0.0, limit=0.0, limited_by="weights and one link stay",
        details={"gpu_bytes": float(allocated)} if settings.gpu else {},
    )  # fmt: skip
    yield Row(
        "chain/host", "the same chain: growth of the ledger, over the bytes of its factors",
        Spread.of([(grown - ledger) / (per_link * (links - 1))]), 1.0, limit=1.0, limited_by="the factors in fp32",
        details={"link_bytes": float(per_link), "chain_bytes": float(grown)},
    )  # fmt: skip


def on_the_gpu(settings: Settings) -> int:
    """Bytes that torch has allocated on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if settings.device == "cuda" else 0


def plain_tensors() -> list[torch.Tensor]:
    """All tensors of exactly these types that the collector knows; a compiler's tracing tensors have no memory."""
    found = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
    return [t for t in found if not torch._is_functional_tensor(t) and t.layout == torch.strided]


def live_bytes(opt: ChainOptimizer) -> tuple[int, int]:
    """Bytes of the storages of all tensors that are alive: outside the chain, and in it."""
    inside = {t.untyped_storage().data_ptr() for link in opt.chain for f in link.factors.values() for t in (f.A, f.B)}
    gc.collect()
    sizes: dict[int, int] = {}
    for tensor in plain_tensors():
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    # the collector does not list tensors held only by C++, so parameters, gradients and state are added
    held: list[torch.Tensor] = [*opt.model.parameters(), *opt.model.buffers()]
    for parameter, state in opt.state.items():
        assert isinstance(parameter, nn.Parameter)
        held += [v for v in (parameter.grad, *state.values()) if isinstance(v, torch.Tensor)]
    for link in opt.chain:
        held += [t for f in link.factors.values() for t in (f.A, f.B)]
    sizes |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    mine = sum(size for address, size in sizes.items() if address in inside)
    return sum(sizes.values()) - mine, mine
