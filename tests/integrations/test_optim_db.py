"""The cases that torch tests its own optimizers with, those that apply to a wrapper: every class, all its options."""

import importlib.util
import sys
import types
import unittest

import pytest
import torch

from cola import ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from tests.models import BODY, Net, closure_steps

if importlib.util.find_spec("expecttest") is None:
    # torch's table shares a file with its test classes, whose parent comes from this package; the table needs none
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase
common = pytest.importorskip("torch.testing._internal.common_optimizers", exc_type=ImportError)
torch.backends.__allow_nonbracketed_mutation_flag = True  # the import forbids setting torch.backends.*

LINK = LinkConfig(r=2, lora_alpha=2, target_modules=BODY)
DENSE = [info for info in common.optim_db if info.optim_cls is not torch.optim.SparseAdam]
CASES = [
    pytest.param(info.optim_cls, case.kwargs, id=f"{info.optim_cls.__name__}-{i}-{case.desc}")
    for info in DENSE
    for i, case in enumerate(info.optim_inputs_func(device="cpu"))
    if not case.kwargs.get("capturable")  # needs an accelerator
]


def same(one, two):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("base", "kwargs"), CASES)
def test_without_knots_it_is_the_base_and_after_one_the_base_is_as_new(base, kwargs):
    model, bare = Net(), Net()
    opt = ChainOptimizer(base, model, NeverKnots(), link=LINK, **kwargs)
    ChainOptimizer(torch.optim.SGD, bare, NeverKnots(), link=LINK, lr=0.1)
    plain = base([p for p in bare.parameters() if p.requires_grad], **kwargs)
    assert closure_steps(opt, model, 3) == closure_steps(plain, bare, 3)
    assert same(model, bare)

    opt.tie()
    twin = Net()
    other = ChainOptimizer(base, twin, StepKnots(at=[99]), link=LINK, **kwargs)
    twin.load_state_dict(model.state_dict())
    assert closure_steps(opt, model, 3, start=3) == closure_steps(other, twin, 3, start=3)
    assert same(model, twin)
