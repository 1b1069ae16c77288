"""A small model with a chain on it."""

import torch

from cola import ChainOptimizer, LinkConfig, StepKnots
from tests.models import BODY, Net

LINK = LinkConfig(r=2, lora_alpha=2, target_modules=BODY)


def chained(model=None, policy=None, base=torch.optim.AdamW, link=LINK, **kwargs):
    model = model or Net()
    return model, ChainOptimizer(base, model, policy or StepKnots(every=3), link=link, **{"lr": 0.02, **kwargs})
