"""One fine-tuning run: an arm, a learning rate, a seed. The same loop for every arm."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cola import ChainOptimizer, KnotReport
from experiments import corpus
from experiments.arms import Adapters, Arm
from experiments.evaluation import bits_per_byte


@dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share.

    Attributes:
        epochs: passes over the training text, the same for every arm.
        train_bytes: how much of the training split is used, in pieces spread evenly over it.
        context: bytes per block.
        batch_size: blocks per optimizer step.
        warmup: steps over which the rate rises, at the start and again after every knot.
        decay: share of the run, at its end, over which the rate falls to zero.
        adapters: their rank, layers and draws.
    """

    epochs: int = 3
    train_bytes: int = 36_864
    context: int = 256
    batch_size: int = 2
    warmup: int = 15
    decay: float = 0.5
    adapters: Adapters = Adapters()  # noqa: RUF009 (frozen)

    def training_text(self, prose: corpus.Prose) -> bytes:
        """The part of the training split that is used."""
        return corpus.thin(prose.text["train"], self.train_bytes)

    def steps_per_epoch(self, prose: corpus.Prose) -> int:
        """Optimizer steps in one epoch."""
        return corpus.batches_per_epoch(self.training_text(prose), self.context, self.batch_size)


@dataclass(frozen=True)
class Knot:
    """One tie as the chain reported it: its step, the link's rank, its norm, the norm lost to rounding."""

    step: int
    rank: int
    norm: float
    norm_lost: float


@dataclass(frozen=True)
class Outcome:
    """What one run yields. Losses are in bits per byte, times in seconds; `losses` has one entry per step."""

    arm: str
    lr: float
    seed: int
    validation: float
    losses: tuple[float, ...]
    knots: tuple[Knot, ...]
    parameters: int
    seconds: float
    cpu_seconds: float


class WarmDecay:
    """The factor on the learning rate: flat, then linear decay to zero, with a linear rise after every knot.

    A link starts like a LoRA of its own, with B = 0 and an optimizer that has seen nothing, so it gets the same warm-up
    as the first one. The decay belongs to the run; it starts late, so that later links are not left without a rate.

    Args:
        total: steps in the run.
        warmup: steps of every rise.
        ties: the steps after which knots were tied so far, oldest first; read anew on every call.
        decay: share of the run, at its end, over which the factor falls to zero; 1 is the usual linear schedule.
    """

    def __init__(self, total: int, warmup: int, ties: Sequence[int], decay: float = 1.0) -> None:
        self.total, self.warmup, self.ties, self.decay = total, warmup, ties, decay

    def __call__(self, step: int) -> float:
        """The factor for the update after `step` updates."""
        since = step - (self.ties[-1] if self.ties else 0)
        left = max(0.0, 1 - step / self.total)
        return min(1.0, left / self.decay) * min(1.0, (since + 1) / (self.warmup + 1))


def fine_tune(
    model: nn.Module,
    arm: Arm,
    lr: float,
    seed: int,
    setting: Setting,
    prose: corpus.Prose,
    chain_folder: Path | None = None,
) -> Outcome:
    """Fine-tune `model` in place and evaluate it on the validation split; the test split is not read.

    `seed` decides the order of the text, the same for every arm, and the adapters' draws.

    Args:
        model: the tiny OPT, fp32; afterwards it holds the merged weights.
        arm: what is trained and how.
        lr: AdamW's peak learning rate.
        seed: of the order and the draws.
        setting: epochs, sizes, schedule.
        prose: the splits.
        chain_folder: where to save the chain, if the arm has one.

    Raises:
        FloatingPointError: the training loss is not finite; the message names arm, rate, seed and step.
    """
    text = setting.training_text(prose)
    total = setting.epochs * setting.steps_per_epoch(prose)
    started, cpu_started = time.perf_counter(), time.process_time()
    model.train()
    optimizer = arm.optimizer(model, setting.adapters, lr=lr, seed=seed, total_steps=total)
    parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    knots: list[Knot] = []
    ties: list[int] = []

    def note(report: KnotReport) -> None:
        ties.append(report.step)
        knots.append(Knot(report.step, report.rank, report.delta_norm, report.lost_norm))

    if isinstance(optimizer, ChainOptimizer):
        optimizer.on_knot(note)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmDecay(total, setting.warmup, ties, setting.decay))
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for _ in range(setting.epochs):
        for ids in corpus.epoch(text, setting.context, setting.batch_size, generator):
            loss = model(input_ids=ids, labels=ids).loss
            losses.append(loss.item() / math.log(2))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"{arm.name}, lr={lr:g}, seed={seed}: loss {losses[-1]} at step {len(losses)}")
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    if isinstance(optimizer, ChainOptimizer):
        optimizer.finish()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    if chain_folder is not None and isinstance(optimizer, ChainOptimizer):
        optimizer.chain.save(chain_folder)
    validation = bits_per_byte(model, prose.text["validation"], setting.context)
    return Outcome(arm.name, lr, seed, validation, tuple(losses), tuple(knots), parameters, seconds, cpu_seconds)
