"""Small models of bitsandbytes' layers, and chains on them."""

import copy
import logging

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, StepKnots
from cola.lora import quantized
from cola.lora.quantized_codes import codes_of

bnb = pytest.importorskip("bitsandbytes")
F = bnb.functional

BODY = ["first", "second"]
LINK = LinkConfig(r=2, lora_alpha=3, target_modules=BODY)  # s = 1.5: folding it into B rounds
BOTH = pytest.mark.parametrize("how", quantized.QUANTIZED)


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says so when it casts an input


class Net(nn.Module):
    """Two quantised layers whose groups of codes cross the ends of rows, and a head."""

    def __init__(self, make):
        super().__init__()
        self.first, self.second, self.head = make(72, 40), make(40, 56), nn.Linear(56, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def four(quant_type, double, compute=torch.float32, **kwargs):
    return lambda m, n: bnb.nn.Linear4bit(
        m, n, quant_type=quant_type, compress_statistics=double, compute_dtype=compute, **kwargs
    )


def eight(m, n):
    return bnb.nn.Linear8bitLt(m, n, has_fp16_weights=False)


KINDS = {
    "nf4": four("nf4", False),
    "nf4 double": four("nf4", True),
    "fp4": four("fp4", False),
    "fp4 double": four("fp4", True),
    "nf4 in bf16": four("nf4", True, quant_storage=torch.bfloat16),
    "int8": eight,
}
EACH = pytest.mark.parametrize("kind", KINDS)


def net(kind="nf4 double", seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(KINDS[kind] if isinstance(kind, str) else kind).to("cpu")  # which quantises


def chained(model, policy=None, base=torch.optim.AdamW, link=LINK, **kwargs):
    return ChainOptimizer(base, model, policy or StepKnots(every=3), link=link, lr=0.01, **kwargs)


def inputs(step):
    return torch.randn(16, 72, generator=torch.Generator().manual_seed(step))


def train(opt, model, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        opt.zero_grad()
        x = inputs(step)
        loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        opt.observe(loss)
        opt.step()
        losses.append(loss.item())
    return losses


def same(one, two):
    mine, theirs = one.state_dict(), two.state_dict()
    return mine.keys() == theirs.keys() and all(equal(mine[name], theirs[name]) for name in mine)


def equal(one, two):
    """By bits: codes that are stored as bf16 may look like NaN."""
    bits = [t.contiguous().view(-1).view(torch.uint8) for t in (one, two)]
    return one.shape == two.shape and torch.equal(*bits)


def decoded(module):
    """The weight in full by bitsandbytes' own functions."""
    if isinstance(module, bnb.nn.Linear8bitLt):
        stored = codes_of(module).stored()
        return F.int8_vectorwise_dequant(stored["weight"], stored["SCB"])
    state = copy.copy(module.weight.quant_state)
    state.dtype = torch.float32
    return F.dequantize_4bit(module.weight.data, state)
