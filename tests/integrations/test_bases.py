"""Bases from other packages: after a knot each is as new."""

import copy

import pytest
import torch

from cola import ChainOptimizer, LinkConfig, StepKnots
from tests.models import BODY, Net, loss_of, train

LINK = LinkConfig(r=2, lora_alpha=2, target_modules=BODY)


def prodigy():
    return pytest.importorskip("prodigyopt").Prodigy, {"lr": 1.0}


def adam8bit():
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.optim.Adam8bit, {"lr": 0.02, "min_8bit_size": 1}


def adafactor():
    from transformers.optimization import Adafactor

    return Adafactor, {"lr": 0.02, "scale_parameter": False, "relative_step": False}


def adafactor_relative():
    from transformers.optimization import Adafactor

    return Adafactor, {"lr": None, "warmup_init": True}


def muon():
    return torch.optim.Muon, {"lr": 0.02}


def schedule_free():
    return pytest.importorskip("schedulefree").AdamWScheduleFree, {"lr": 0.02}


BASES = [prodigy, adam8bit, adafactor, adafactor_relative, muon, schedule_free]


def start(make):
    base, kwargs = make()
    model = Net()
    opt = ChainOptimizer(base, model, StepKnots(at=[3]), link=LINK, **kwargs)
    try:
        loss_of(model, 0).backward()
        opt.base.step() if make is adam8bit else None
    except (RuntimeError, NotImplementedError, ValueError) as error:
        pytest.skip(f"{base.__name__} does not run on this machine: {error}")
    if make is adam8bit:
        model = Net()
        opt = ChainOptimizer(base, model, StepKnots(at=[3]), link=LINK, **kwargs)
    return model, opt, base, kwargs


@pytest.mark.parametrize("make", BASES, ids=lambda make: make.__name__)
def test_after_a_knot_the_base_is_as_new(make):
    """The link after a knot trains exactly as in a run that begins with its weights and its factors."""
    model, opt, base, kwargs = start(make)
    opt.train()
    train(opt, model, 3)
    assert len(opt.chain) == 1
    twin = Net()
    other = ChainOptimizer(base, twin, StepKnots(at=[99]), link=LINK, **kwargs)
    other.train()
    twin.load_state_dict(model.state_dict())
    assert train(opt, model, 4, start=3) == train(other, twin, 4, start=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


@pytest.mark.parametrize("make", BASES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("steps", [3, 4])
def test_runs_resume_bit_for_bit_in_both_ways(make, steps, tmp_path):
    """Counters that live in the groups, 8-bit codes and modes included; right after the knot and in mid-link."""
    model, opt, base, kwargs = start(make)
    opt.train()
    train(opt, model, steps)
    opt.save(tmp_path)
    states = copy.deepcopy((model.state_dict(), opt.state_dict()))
    losses = train(opt, model, 4, start=steps)
    for way in ("save", "state_dict"):
        again = Net()
        other = ChainOptimizer(base, again, StepKnots(at=[3]), link=LINK, **kwargs)
        other.train()
        if way == "save":
            other.load(tmp_path)
        else:
            again.load_state_dict(states[0])
            other.load_state_dict(copy.deepcopy(states[1]))
        assert train(other, again, 4, start=steps) == losses, way


def test_under_schedule_free_the_evaluation_loss_is_continuous_through_a_knot():
    model, opt, *_ = start(schedule_free)
    opt.train()
    train(opt, model, 2)
    opt.eval()
    before = loss_of(model, 0).item()
    opt.train()
    opt.tie()
    opt.eval()
    # W x + sBA x and (W + sBA) x in fp32
    assert loss_of(model, 0).item() == pytest.approx(before, rel=1e-6)


def test_an_adafactor_of_relative_steps_is_warned_of(caplog):
    for make, told in ((adafactor, 0), (adafactor_relative, 1)):
        base, kwargs = make()
        ChainOptimizer(base, Net(), StepKnots(at=[3]), link=LINK, **kwargs)
        assert caplog.text.count("pass scale_parameter=False, relative_step=False and an lr") == told
