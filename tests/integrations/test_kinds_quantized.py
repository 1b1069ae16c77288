"""Quantised layers of the kinds that read their weight: refused in words, and left out by "all"."""

import logging

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, NeverKnots
from tests.kinds import Experts


def chained(model, **link):
    return ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=LinkConfig(r=2, **link), lr=0.1)


class Model(nn.Module):
    """A linear layer, and experts whose weights are stored in another dtype."""

    def __init__(self, dtype, experts=None):
        super().__init__()
        self.plain, self.experts = nn.Linear(8, 8), experts or Experts()
        if experts is None:
            codes = (torch.randn(self.experts.proj.shape) * 4).to(dtype)
            self.experts.proj = nn.Parameter(codes, requires_grad=False)


STORED = {
    "float8": (torch.float8_e4m3fn, "has a torch.float8_e4m3fn weight"),
    "MXFP4, two codes a byte": (torch.uint8, "has a torch.uint8 weight"),
    "int8": (torch.int8, "has a torch.int8 weight"),
}


@pytest.mark.parametrize("name", STORED)
def test_quantised_experts_are_left_out_or_refused_by_name(name, caplog):
    dtype, reason = STORED[name]
    model = Model(dtype)
    before = model.experts.proj.clone()
    with caplog.at_level(logging.WARNING, "cola"):
        opt = chained(model, target_modules="all")
    assert list(opt.live.layers) == ["plain"]
    assert "leaves out experts.proj: it" in caplog.text
    assert reason in caplog.text
    assert "fused experts" in {one.group for one in opt.coverage().left_out}
    opt.finish(merge=False)
    with pytest.raises(ValueError, match=rf"'experts.proj' {reason} \(quantised\?\): links can be tied into"):
        chained(model, target_modules=[], target_parameters=["proj"])
    assert type(model.experts) is Experts
    assert torch.equal(model.experts.proj.view(torch.uint8), before.view(torch.uint8))


def test_an_embedding_of_bitsandbytes_is_refused(caplog):
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict({"plain": nn.Linear(64, 64), "table": bnb.nn.Embedding8bit(64, 64).requires_grad_(False)})
    model.table.weight.data = torch.randint(-127, 127, (64, 64), dtype=torch.int8)
    with caplog.at_level(logging.WARNING, "cola"):
        assert list(chained(model, target_modules="all").live.layers) == ["plain"]
    assert "leaves out table: it is bitsandbytes' Embedding8bit, whose weight is stored as codes" in caplog.text


def test_experts_of_transformers_in_mxfp4_are_refused(caplog):
    """As a model of GPT-OSS holds them: blocks of two codes a byte, and scales."""
    pytest.importorskip("transformers.integrations.mxfp4")
    from transformers import GptOssConfig
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    config = GptOssConfig(hidden_size=64, intermediate_size=64, num_local_experts=2)
    model = nn.ModuleDict({"plain": nn.Linear(64, 64), "experts": Mxfp4GptOssExperts(config)})
    with caplog.at_level(logging.WARNING, "cola"):
        assert list(chained(model, target_modules="all").live.layers) == ["plain"]
    assert (
        "leaves out experts.gate_up_proj, experts.down_proj: each has a torch.uint8 weight (quantised?)" in caplog.text
    )
