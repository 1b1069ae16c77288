"""The training loop of the offline experiments: plain torch, as a user would write it.

The paper's cells (`paper/finetune.py`) use transformers' `Trainer` instead, as the protocol does: clipping,
accumulation, mixed precision, several processes, the best epoch's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cola import ChainOptimizer, KnotReport
from experiments.memory import trained_bytes


@dataclass(frozen=True)
class WarmDecay:
    """The factor on the learning rate: flat, then linear decay to zero, with a linear rise after every knot.

    Every link starts like a new LoRA, with B = 0 and fresh optimizer state, so it gets the same warm-up as the first.
    The decay belongs to the run; it may start late, so that later links still have a rate. The defaults are the
    paper's: linear decay over the whole run, without a warm-up.

    Attributes:
        total: steps in the run.
        warmup: steps of every rise.
        decay: share of the run, at its end, over which the factor falls to zero.
    """

    total: int
    warmup: int = 0
    decay: float = 1.0

    def __call__(self, step: int, ties: Sequence[int]) -> float:
        """The factor for the update after `step` updates, with knots tied after the updates in `ties`."""
        since = step - (ties[-1] if ties else 0)
        left = max(0.0, 1 - step / self.total)
        return min(1.0, left / self.decay) * min(1.0, (since + 1) / (self.warmup + 1))


@dataclass(frozen=True)
class Trained:
    """The record of a run.

    Attributes:
        losses: nats per predicted token, one per optimizer step.
        knots: the report of every tie, `finish()`'s last; none without a chain.
        parameters: trainable at once, at most.
        state_bytes: of trained state, as `trained_bytes` counts them after the first step.
    """

    losses: list[float]
    knots: list[KnotReport]
    parameters: int
    state_bytes: int


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: Iterable[Iterable[torch.Tensor]],
    factor: Callable[[int, Sequence[int]], float],
    between: Callable[[], object] = lambda: None,
) -> Trained:
    """Fine-tune `model` in place on batches of token ids, and finish the chain or merge the adapter if there is one.

    Args:
        model: a causal language model of transformers.
        optimizer: over the trained parameters.
        epochs: batches per epoch, int64, blocks × tokens; read lazily.
        factor: step, steps of the ties so far -> factor on the learning rate, such as a `WarmDecay`.
        between: called between two epochs.

    Raises:
        FloatingPointError: the loss is not finite.
        KnotError: a link is not.
    """
    parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    knots: list[KnotReport] = []
    if isinstance(optimizer, ChainOptimizer):
        optimizer.on_knot(knots.append)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, [knot.step for knot in knots]))
    losses: list[float] = []
    state_bytes = 0
    model.train()
    for epoch, batches in enumerate(epochs):
        if epoch:
            between()
        for ids in batches:
            loss = model(input_ids=ids, labels=ids).loss
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} at step {len(losses)}")
            loss.backward()
            optimizer.step()
            state_bytes = state_bytes or trained_bytes(optimizer)
            schedule.step()
            optimizer.zero_grad()
    finish = getattr(optimizer, "finish", None)  # of a chain, and of PEFT's adapters
    if finish is not None:
        finish()
    return Trained(losses, knots, parameters, state_bytes)
