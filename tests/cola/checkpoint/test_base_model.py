"""When a base is looked at: as it was before training moved it, whatever moves it and whenever."""

import copy
import json

import pytest
import torch

from cola import Chain, ChainOptimizer, LinkConfig, StepKnots
from cola.chain.fingerprint import checksum, prints_of
from cola.lora.names import base_tensors
from tests.cola.checkpoint.bases_of_chains import EVERYTHING, Wide, altered_head, same, wrap
from tests.models import BODY, Net, loss_of, train


def test_the_base_is_what_the_weights_were_at_the_first_knot():
    """A state dict that arrives after the optimizer was made is the base."""
    model = Net()
    opt = ChainOptimizer(torch.optim.SGD, model, StepKnots(every=1), link=LinkConfig(r=1, target_modules=BODY), lr=0.1)
    model.load_state_dict(Net(seed=8).state_dict(), strict=False)
    loss_of(model, 0).backward()
    opt.step()
    opt.finish()
    fresh = Net(seed=8)
    opt.chain.apply(fresh)
    assert same(fresh, model)


BESIDE = {"biases": {"bias": "lora_only"}, "head": {"modules_to_save": ["head"]}}


@pytest.mark.parametrize("what", BESIDE)
@pytest.mark.parametrize("late", [False, True])
def test_what_is_trained_beside_the_links_is_recorded_as_it_was_in_the_base(what, late):
    """Whatever arrived before the first step is the base, also where a checkpoint was written at once."""
    model = Net(seed=8 if not late else 0)
    opt = wrap(model, **BESIDE[what])
    if late:
        model.load_state_dict(Net(seed=8).state_dict(), strict=False)
    train(opt, model, 3)
    opt.finish()
    expected = prints_of(base_tensors(Net(seed=8)))
    found = opt.chain.base.prints()
    assert {n: p.digest for n, p in found.items()} == {n: p.digest for n, p in expected.items()}


def test_a_save_before_the_first_step_fixes_nothing(tmp_path):
    model = Wide()
    opt = wrap(model, modules_to_save=["head"])
    opt.save(tmp_path)
    assert Chain.load(tmp_path).base.prints().keys() == set(EVERYTHING)
    other = Wide(seed=8)
    other.scale.mul_(3)
    model.load_state_dict(other.state_dict(), strict=False)
    train(opt, model, 3)
    opt.finish()
    expected = prints_of(base_tensors(other))
    assert {n: p.digest for n, p in opt.chain.base.prints().items()} == {n: p.digest for n, p in expected.items()}


@pytest.mark.parametrize("way", ["save", "state_dict"])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_knows_the_base_as_it_was(way, stop, tmp_path):
    """At the first link nothing but the saved state remembers what the trained values were."""
    model = Net()
    opt = wrap(model, bias="lora_only", modules_to_save=["head"])
    train(opt, model, stop)
    resumed = Net()
    again = wrap(resumed, bias="lora_only", modules_to_save=["head"])
    if way == "save":
        opt.save(tmp_path)
        again.load(tmp_path)
    else:
        resumed.load_state_dict(copy.deepcopy(model.state_dict()))
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for run, net in ((opt, model), (again, resumed)):
        train(run, net, 4, start=stop)
        run.finish()
    assert again.chain.base == opt.chain.base
    fresh = Net()
    again.chain.apply(fresh)
    assert same(fresh, resumed)
    with pytest.raises(ValueError, match=r"'head.bias' has other values"):
        again.chain.apply(altered_head(), upto=0)


def test_values_that_are_not_known_are_not_compared():
    """A framework has dropped all but the parameters' own entries in a run that had trained its head already."""
    model = Net()
    opt = wrap(model, modules_to_save=["head"])
    train(opt, model, 1)
    state = copy.deepcopy(opt.state_dict())
    counted = json.loads(state["param_groups"][0]["cola"])
    state["param_groups"][0]["cola"] = json.dumps({**counted, "origin": None})
    resumed = Net()
    again = wrap(resumed, modules_to_save=["head"])
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    again.load_state_dict(state)
    train(again, resumed, 3, start=1)
    again.finish()
    assert again.chain.base.others["head.weight"].digest is None
    assert again.chain.base.others["head.weight"].shape == (3, 6)
    assert again.chain.base.others["first.bias"].digest is not None
    fresh = Net()
    again.chain.apply(fresh)
    assert same(fresh, resumed)


def test_parameters_that_are_trained_from_some_step_on():
    model = Net()
    opt = wrap(model)
    train(opt, model, 1)
    opt.add_param_group({"params": [model.head.weight], "lr": 0.1})
    train(opt, model, 2, start=1)
    opt.finish()
    assert "head.weight" in opt.chain[0].trained
    assert opt.chain.base.others["head.weight"].digest == checksum(Net().head.weight)
    fresh = Net()
    opt.chain.apply(fresh)
    assert same(fresh, model)


def test_what_another_optimizer_trains_is_the_bases_as_it_was(tmp_path):
    """The chain knows nothing of it; so a base whose own value is there is the right one."""
    model = Net()
    opt = wrap(model)
    model.head.requires_grad_(True)
    other = torch.optim.SGD(model.head.parameters(), lr=0.1)
    for step in range(3):
        train(opt, model, 1, start=step)
        other.step()
    assert not torch.equal(model.head.weight, Net().head.weight)
    opt.save(tmp_path)
    wrap(Net()).load(tmp_path)
    opt.finish()
    fresh = Net()
    opt.chain.apply(fresh)
    assert torch.equal(fresh.first.weight, model.first.weight)
    assert torch.equal(fresh.head.weight, Net().head.weight)


def test_an_adapted_weight_is_trained_by_its_links_alone():
    model = Net()
    opt = wrap(model)
    groups = len(opt.param_groups)
    for params in (model.first.weight, [model.head.weight, model.first.weight], model.first.parameters()):
        with pytest.raises(ValueError, match="param_group holds the weight of the adapted layer 'first'"):
            opt.add_param_group({"params": params})
    assert len(opt.param_groups) == groups
    assert not model.first.weight.requires_grad
    opt.add_param_group({"params": iter([model.head.weight])})
    assert len(opt.param_groups[-1]["params"]) == 1


def test_an_adapted_weight_that_another_optimizer_trains_is_the_bases_as_it_was():
    model = Net()
    opt = wrap(model)
    model.first.weight.requires_grad_(True)
    other = torch.optim.SGD([model.first.weight], lr=0.1)
    for step in range(3):
        train(opt, model, 1, start=step)
        other.step()
    opt.finish()
    assert opt.chain.base.layers["first"].digest == checksum(Net().first.weight)


def test_what_is_added_inside_the_first_step_is_looked_at_before_the_next():
    """A closure, or a hook of the base, may add groups; Lightning runs the whole training step in one."""
    model = Wide()
    opt = wrap(model)

    def closure():
        if len(opt.param_groups) == 1:
            model.scale.requires_grad_()
            opt.add_param_group({"params": [model.scale]})
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    opt.step(closure)
    assert not opt._base_model.settled
    opt.step(closure)
    assert opt._base_model.settled
    assert "scale" in opt._base_model.prints
