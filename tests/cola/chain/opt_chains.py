"""A chain on a small OPT, and what it computes."""

import torch

from cola import ChainOptimizer, LinkConfig, StepKnots
from tests.models import loss_of

IDS = torch.arange(24).view(2, 12) % 30


def fit(model, links=3, lr=0.05, **link):
    """Train a chain; returns the merged model and the chain."""
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(**{"r": 2, **link}), lr=lr)
    for step in range(2 * links - 1):
        opt.zero_grad()
        if hasattr(model, "config"):
            model(input_ids=IDS, labels=IDS).loss.backward()
        else:
            loss_of(model, step).backward()
        opt.step()
    opt.finish()
    return model.eval(), opt.chain


def output(model):
    model.eval()
    with torch.no_grad():
        if hasattr(model, "config") and hasattr(model.config, "vocab_size"):
            return model(input_ids=IDS).logits
        return model(torch.randn(5, 6, generator=torch.Generator().manual_seed(1)))


def close(one, other, steps=64):
    """fp32 sums of the same products in another order: some units of the last place of the largest output."""
    return (one - other).abs().max() <= steps * torch.finfo(torch.float32).eps * one.abs().max()
