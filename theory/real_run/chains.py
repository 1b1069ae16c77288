"""The two chains of ``python -m theory.llm_gap``: that of the demo, and one on a random network."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cola import ChainOptimizer, EvenKnots, LinkConfig
from theory.command_line import progress
from theory.real_run.probe import GapProbe


@dataclass
class Trained:
    """A finished chain with its probe and the training losses (nats), one per step."""

    probe: GapProbe
    losses: list[float]


def train(options: argparse.Namespace) -> Trained:
    """Train the chain that the options name; the probe measures every link when its knot is tied."""
    return _demo(options) if options.model == "demo" else _random(options)


def _demo(options: argparse.Namespace) -> Trained:
    """Train a chain of the study's control, with its model, text, arm and schedule."""
    try:
        from experiments.study import control
        from experiments.study.cells import StudyCell
        from experiments.study.training import train as fine_tune
        from experiments.tiny import corpus, tiny_opt
    except ImportError as error:
        raise ImportError(f"--model demo needs transformers ({error}): install it, or use --model random") from error
    chains = {name: arm for name, arm in control.arms().items() if arm.method.adapts}
    if options.arm not in chains:
        raise ValueError(f"--arm {options.arm!r} is not a chain: choose from {', '.join(chains)}")
    tiny_opt.quiet()
    arm, setting, model = chains[options.arm], control.preset(epochs=options.epochs), tiny_opt.load()
    lr = arm.start if options.lr is None else options.lr
    optimizer = StudyCell(setting, arm.method, lr, options.seed).optimizer(model)
    assert isinstance(optimizer, ChainOptimizer)
    # blocks spread evenly over the text, in turn for the fixed loss and for the fresh pass
    blocks = corpus.blocks(setting.training_text(), setting.context)
    wanted = 2 * options.probe_batches * setting.batch_size
    if wanted > len(blocks):
        raise ValueError(
            f"--probe-batches must be at most {len(blocks) // (2 * setting.batch_size)}, got "
            f"{options.probe_batches}: the text has {len(blocks)} blocks"
        )
    spread = blocks[torch.linspace(0, len(blocks) - 1, wanted).long()]
    batches = [{"input_ids": ids, "labels": ids} for ids in spread[::2].split(setting.batch_size)]
    fresh = [{"input_ids": ids, "labels": ids} for ids in spread[1::2].split(setting.batch_size)]
    probe = GapProbe(model, optimizer, batches, **_probe_options(options, fresh))
    batches_read = itertools.chain.from_iterable(setting.read(options.seed))
    steps = (batch for _, batch in zip(progress(range(setting.steps()), "step"), batches_read))
    try:
        return Trained(probe, fine_tune(model, optimizer, [steps], setting.schedule()).losses)
    except FloatingPointError as error:
        raise ValueError(f"{error}: lower --lr") from error


def _random(options: argparse.Namespace) -> Trained:
    """Train a chain on a random two-layer network and a random teacher; it needs only torch."""
    generator = torch.Generator().manual_seed(options.seed)
    x = torch.randn(256, 24, generator=generator)
    y = torch.tanh(x @ torch.randn(24, 12, generator=generator) / 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 12))
    total = 30 * options.epochs
    link = LinkConfig(r=2, lora_alpha=4, target_modules="all-linear")
    lr = 1e-2 if options.lr is None else options.lr
    optimizer = ChainOptimizer(
        torch.optim.AdamW, model, EvenKnots(length=3, total_steps=total), link=link, seed=options.seed, lr=lr
    )

    def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    halves = list(zip(x.split(32), y.split(32)))
    probe = GapProbe(model, optimizer, halves[:4], loss_of, **_probe_options(options, halves[4:]))
    losses: list[float] = []
    for step in progress(range(total), "step"):
        loss = loss_of(model, halves[step % len(halves)])
        losses.append(_finite(loss, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finish()
    return Trained(probe, losses)


def _probe_options(options: argparse.Namespace, fresh: Sequence[Any]) -> dict[str, Any]:
    chosen = {name: getattr(options, name) for name in ("sketch", "rank", "ball", "seed")}
    return {**chosen, "fresh": fresh if options.fresh else None}


def _finite(loss: Tensor, step: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"the training loss is {value} at step {step}: lower --lr")
    return value
