"""Held-out bits per byte."""

from __future__ import annotations

import math

import torch
from torch import nn

from experiments import corpus


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: bytes, context: int, batch_size: int = 32) -> float:
    """The mean cost of a byte of `text` under `model`, in bits; `model` keeps its mode.

    The text is cut into consecutive blocks of `context` bytes, each predicted from `BOS` on, so a byte is
    seen with at most `context` - 1 before it; the last incomplete block is left out.

    Args:
        model: a causal language model of transformers over `corpus.VOCABULARY` tokens.
        text: the bytes to predict.
        context: bytes per block.
        batch_size: blocks per forward pass; it does not change the result beyond rounding.
    """
    training = model.training
    model.eval()
    nats, count = 0.0, 0
    for ids in corpus.blocks(text, context).split(batch_size):
        nats += model(input_ids=ids, labels=ids).loss.item() * len(ids)
        count += len(ids)
    model.train(training)
    return nats / count / math.log(2)
