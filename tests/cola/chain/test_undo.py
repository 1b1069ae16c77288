"""A chain goes back by a link, and on from an earlier one."""

import copy

import pytest
import torch

from cola import ChainOptimizer, LinkConfig, StepKnots
from tests.cola.chain.stored import same, trained
from tests.models import BODY, Net, train


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("as_state_dict", [True, False])
def test_undo_rebuilds_the_weights_without_the_last_link(rounding, as_state_dict):
    options = {"rounding": rounding, "dtype": torch.bfloat16, "bias": "lora_only"}
    model, chain = trained(steps=8, **options)
    base = Net(dtype=torch.bfloat16)
    expected = Net(dtype=torch.bfloat16)
    chain.apply(expected, upto=len(chain) - 1)
    last = chain[-1]
    assert chain.undo(model, base.state_dict() if as_state_dict else base) is last
    assert same(model, expected)
    while len(chain):
        chain.undo(model, base)
    assert same(model, base)
    with pytest.raises(ValueError, match="empty chain"):
        chain.undo()


def test_undo_refuses_another_base_and_changes_nothing():
    model, chain = trained()
    before = copy.deepcopy(model)
    for bad, message in ((Net(seed=9), "wrong base"), (model, "the model itself"), ({}, "base has no 'first.weight'")):
        with pytest.raises(ValueError, match=message):
            chain.undo(model, bad)
    with pytest.raises(ValueError, match="needs both"):
        chain.undo(model)
    assert len(chain) == 4
    assert same(model, before)


def test_undo_in_a_run_begins_the_link_again():
    """Trained on from there with the same batches, the run repeats itself."""
    model = Net()
    policy = StepKnots(at=[2, 4])
    opt = ChainOptimizer(torch.optim.AdamW, model, policy, link=LinkConfig(r=2, target_modules=BODY), lr=0.02)
    train(opt, model, 2)
    expected = copy.deepcopy(model.state_dict())
    train(opt, model, 3, start=2)
    undone = opt.undo(Net())
    assert undone.index == 1
    assert opt.live.index == 1
    assert not opt.state
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.values()))
    opt.undo(Net().state_dict())
    assert torch.equal(model.first.weight, Net().first.weight)
    train(opt, model, 2)
    opt.tie()
    assert len(opt.chain) == 1
    with pytest.raises(ValueError, match="wrong base"):
        opt.undo(Net(seed=4))
    opt.undo(Net())
    with pytest.raises(ValueError, match="no knot"):
        opt.undo(Net())


def test_follow_goes_on_after_an_earlier_chain(tmp_path):
    model, earlier = trained(steps=4)
    followed = Net()
    opt = ChainOptimizer(
        torch.optim.AdamW, followed, StepKnots(every=3), link=LinkConfig(r=1, target_modules=["second"]), lr=0.02
    )
    opt.follow(earlier)
    assert torch.equal(followed.first.weight, model.first.weight)
    train(opt, followed, 4)
    opt.save(tmp_path)
    again = Net()
    other = ChainOptimizer(
        torch.optim.AdamW, again, StepKnots(every=3), link=LinkConfig(r=1, target_modules=["second"]), lr=0.02
    )
    other.load(tmp_path)
    opt.finish(), other.finish()
    assert [link.index for link in opt.chain] == [0, 1, 2, 3]
    fresh = Net()
    opt.chain.apply(fresh)
    assert same(fresh, followed)
    assert same(fresh, again)
    with pytest.raises(ValueError, match="wrong base"):
        ChainOptimizer(
            torch.optim.SGD, Net(seed=2), StepKnots(every=3), link=LinkConfig(r=1, target_modules=BODY), lr=0.1
        ).follow(earlier)
