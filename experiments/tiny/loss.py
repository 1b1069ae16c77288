"""Held-out loss of a language model, in nats per token and in bits per byte."""

from __future__ import annotations

import math

import torch
from torch import nn

from experiments.tiny import corpus


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: torch.Tensor, batch: int = 32) -> float:
    """The mean cost of a predicted token under `model`, in nats; `model` keeps its mode.

    Args:
        model: a causal language model of transformers.
        ids: blocks of equal length, int64, n × tokens.
        batch: blocks per forward pass; it does not change the result beyond rounding.
    """
    training = model.training
    model.eval()
    total = sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in ids.split(batch))
    model.train(training)
    return total / len(ids)


def bits_per_byte(model: nn.Module, text: bytes, context: int, batch: int = 32) -> float:
    """The mean cost of a byte of `text` under `model`, in bits; `model` keeps its mode.

    The text is cut into consecutive blocks of `context` bytes, each predicted from `BOS` on, so a byte is
    seen with at most `context` - 1 bytes before it. The last incomplete block is left out.

    Args:
        model: a causal language model of transformers over `corpus.VOCABULARY` tokens.
        text: the bytes to predict.
        context: bytes per block.
        batch: blocks per forward pass, as for `held_out_loss`.
    """
    return held_out_loss(model, corpus.blocks(text, context), batch) / math.log(2)
