"""A knot happens whole or not at all."""

import copy
import os
import signal

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, KnotError, LinkConfig, NeverKnots, StepKnots, live
from cola.adapters import AdaptedLayer
from tests.models import BODY, Net, loss_of, train

LINK = LinkConfig(r=(2, 1), lora_alpha=2, target_modules=BODY)


def state_of(model, opt):
    return copy.deepcopy((model.state_dict(), opt.state_dict(), [p.grad for p in opt.live.adapters()]))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or (a.isnan().any() and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("how", ["tie", "finish", "step"])
def test_a_link_that_is_not_finite_is_never_merged(value, factor, how):
    model = Net()
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(at=[4]), link=LINK, lr=0.02)
    train(opt, model, 3)
    with torch.no_grad():
        getattr(model.second, factor)[0, 0] = value
    base = {n: getattr(model, n).weight.clone() for n in BODY}
    before = state_of(model, opt)
    # a step spreads the damage to every factor; the first is named
    named = r"lora_. of layer '\w+'" if how == "step" else f"{factor} of layer 'second'"
    with pytest.raises(KnotError, match=f"link 0 is not tied: {named} has non-finite values.*untouched"):
        train(opt, model, 1) if how == "step" else getattr(opt, how)()
    assert all(torch.equal(getattr(model, n).weight, w) for n, w in base.items())
    assert len(opt.chain) == 0
    if how != "step":
        assert same(before, state_of(model, opt))
    with torch.no_grad():
        for p in opt.live.adapters():
            p.nan_to_num_(0.0, 0.0, 0.0)
    opt.tie()
    opt.finish()
    assert all(p.isfinite().all() for p in model.parameters())


def test_dropping_a_bad_link_gives_the_base_back():
    model = Net()
    base = copy.deepcopy(model.state_dict())
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LINK, lr=0.02)
    train(opt, model, 2)
    with torch.no_grad():
        model.first.lora_B.fill_(float("nan"))
    assert opt.finish(merge=False) is None
    assert same(base, model.state_dict())
    assert type(model.first) is nn.Linear


def test_a_sum_that_overflows_fp16_is_refused():
    model = Net(dtype=torch.float16)
    opt = ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=LINK, lr=0.02)
    with torch.no_grad():
        model.first.lora_A.fill_(1000.0), model.first.lora_B.fill_(100.0)
    before = state_of(model, opt)
    with pytest.raises(KnotError, match=r"W \+ sBA of layer 'first' is not finite in torch.float16"):
        opt.tie()
    assert same(before, state_of(model, opt))


@pytest.mark.parametrize("fail_at", ["second draw", "factory", "put", "copy"])
def test_a_failure_while_preparing_leaves_everything_as_it_was(fail_at, monkeypatch):
    """Failures are injected where memory or a user's code can fail: the draw, the base's constructor, the factors."""
    calls, armed = [0], [False]

    def boom(*args, **kwargs):
        raise MemoryError("no room")

    def factory(groups):
        if armed[0] and fail_at == "factory":
            boom()
        return torch.optim.AdamW(groups, lr=0.02)

    def rank(link):
        if armed[0] and link == 1 and fail_at == "second draw":
            boom()
        return 2 - link if link < 2 else 1

    model = Net()
    link = LinkConfig(r=rank, lora_alpha=2, target_modules=BODY)
    opt = ChainOptimizer(factory, model, NeverKnots(), link=link)
    train(opt, model, 3)
    loss_of(model, 3).backward()
    before, twin = state_of(model, opt), copy.deepcopy
    armed[0] = True
    put = AdaptedLayer.put

    def failing_put(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 2:
            boom()
        return put(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        if fail_at == "put":
            patch.setattr(AdaptedLayer, "put", failing_put)
        if fail_at == "copy":
            patch.setattr("cola.live.Factor", boom)
        with pytest.raises(MemoryError, match="no room"):
            opt.tie()
    armed[0] = False
    assert same(before, state_of(model, opt))
    assert twin is copy.deepcopy
    losses = train(opt, model, 3, start=3)
    other = Net()
    undisturbed = ChainOptimizer(factory, other, NeverKnots(), link=link)
    train(undisturbed, other, 3)
    assert losses == train(undisturbed, other, 3, start=3)


def test_a_listener_that_raises_finds_the_knot_tied():
    model = Net()
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=LINK, lr=0.02)

    @opt.on_knot
    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(opt, model, 2)
    assert len(opt.chain) == 1
    assert opt.live.index == 1
    assert not model.first.lora_B.any()


def test_after_a_knot_the_new_link_is_new():
    model = Net()
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LINK, lr=0.02)
    train(opt, model, 3)
    old = model.first.lora_A.detach().clone()
    opt.tie()
    assert not model.first.lora_B.any()
    assert model.first.lora_A.shape == (1, 6)
    assert not torch.equal(model.first.lora_A, old[:1])
    assert not any(opt.state.get(p) for p in opt.live.adapters())
    assert all(p.grad is None for p in opt.live.adapters())


def test_weights_that_were_broken_before_are_named():
    model = Net()
    with torch.no_grad():
        model.second.weight[0, 0] = float("nan")
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LINK, lr=0.02)
    with pytest.raises(KnotError, match="tied weight of layer 'second' is nan from"):
        opt.tie()


def test_an_interrupt_in_the_middle_of_a_tie_waits_for_the_knot(monkeypatch):
    model, twin = Net(), Net()
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LINK, lr=0.02)
    undisturbed = ChainOptimizer(torch.optim.AdamW, twin, NeverKnots(), link=LINK, lr=0.02)
    train(opt, model, 3), train(undisturbed, twin, 3)
    real = live.tie_anywhere

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(live, "tie_anywhere", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.tie()
    undisturbed.tie()
    assert len(opt.chain) == 1
    assert train(opt, model, 3, start=3) == train(undisturbed, twin, 3, start=3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
