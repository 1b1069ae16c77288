"""A chain that is worth storing, and how two are compared."""

import torch

from cola import ChainOptimizer, LinkConfig, StepKnots
from cola.chain import on_disk
from tests.models import BODY, Net, train


def trained(steps=7, rounding="auto", dtype=torch.float32, **link):
    """A model at the end of a chain of links tied every two steps, and its chain."""
    model = Net(dtype=dtype)
    config = LinkConfig(**{"r": 2, "target_modules": BODY, **link})
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=config, rounding=rounding, seed=5, lr=0.02)
    train(opt, model, steps, dtype=dtype)
    opt.finish()
    return model, opt.chain


def same_links(one, other):
    return len(one) == len(other) and all(
        on_disk.link_to_bytes(a) == on_disk.link_to_bytes(b) for a, b in zip(one, other)
    )


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
