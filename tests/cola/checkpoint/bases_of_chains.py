"""Chains whose base is looked at: a model with every kind of tensor, and a head drawn anew."""

import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, StepKnots
from tests.models import BODY, Net, train


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def wrap(model, **link):
    config = LinkConfig(**{"r": 2, "target_modules": BODY, **link})
    return ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=config, seed=5, lr=0.02)


def trained(steps=5, **link):
    model = Net()
    opt = wrap(model, **link)
    train(opt, model, steps)
    opt.finish()
    return model, opt.chain


class Wide(Net):
    """With what else a base can hold: an embedding, a norm, a frozen layer, buffers."""

    def __init__(self, seed=0):
        super().__init__(seed=seed)
        self.table, self.norm = nn.Embedding(4, 6), nn.LayerNorm(6)
        with torch.no_grad():
            self.table.weight.copy_(torch.arange(24.0).view(4, 6) / 24)
        self.register_buffer("scale", torch.full((6,), 0.5))
        self.register_buffer("mask", torch.ones(6), persistent=False)

    def forward(self, x):
        return super().forward(self.norm(x) * self.scale * self.mask + self.table.weight[0])


EVERYTHING = sorted(dict(Wide().state_dict()))


def altered_head():
    model = Net()
    with torch.no_grad():
        model.head.bias[0] += 1
    return model
