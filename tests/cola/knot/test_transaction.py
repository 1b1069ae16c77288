"""A knot happens whole or not at all."""

import contextlib
import copy
import os
import signal

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, KnotError, LinkConfig, NeverKnots, StepKnots
from cola.lora import layer
from cola.lora.layer import AdaptedLayer
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
    with pytest.raises(
        KnotError, match=r"layer 'first' would get a W \+ sBA beyond 65504, the largest number of torch.float16"
    ):
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
            patch.setattr("cola.lora.live.Factor", boom)
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


def test_weights_that_were_broken_before_are_named_and_nothing_is_tied():
    model = Net()
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LINK, lr=0.02)
    train(opt, model, 2)
    with torch.no_grad():
        good, model.second.weight[0, 0] = model.second.weight[0, 0].item(), float("nan")
    before = state_of(model, opt)
    for call in (opt.tie, opt.finish):
        with pytest.raises(KnotError, match="link 0 is not tied: layer 'second' has a weight with non-finite values"):
            call()
    assert same(before, state_of(model, opt))
    with torch.no_grad():
        model.second.weight[0, 0] = good
    opt.tie()
    assert len(opt.chain) == 1


def test_fp16_weights_at_the_limit_are_refused_rather_than_rounded_up_to_infinity():
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).half()
    with torch.no_grad():
        model[0].weight.fill_(65504.0)
    link = LinkConfig(r=1, lora_alpha=1, target_modules="all-linear")
    opt = ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=link, lr=0.1)
    with torch.no_grad():
        model[0].lora_A.fill_(1.0), model[0].lora_B.fill_(10.0)
    with pytest.raises(KnotError, match="largest number"):
        opt.tie()
    assert model[0].weight.isfinite().all()


def raising(*args):
    raise RuntimeError("disk full")


@pytest.mark.parametrize("how", ["listener", "policy", "interrupt", "finish inside", "tie inside"])
def test_a_finish_that_is_disturbed_has_tied_once(how, monkeypatch):
    model, twin = Net(), Net()
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LINK, lr=0.02)
    other = ChainOptimizer(torch.optim.AdamW, twin, NeverKnots(), link=LINK, lr=0.02)
    train(opt, model, 5), train(other, twin, 5)
    other.finish()
    error, match = RuntimeError, "disk full"
    if how == "listener":
        opt.on_knot(raising)
    elif how == "policy":
        opt.policy.knotted = raising
    elif how == "interrupt":
        error, match = KeyboardInterrupt, None
        monkeypatch.setattr(layer, "tie_anywhere", interrupted(layer.tie_anywhere))
    else:
        opt.on_knot(lambda report: opt.finish() if how == "finish inside" else opt.tie())
        match = "after finish"
    with default_interrupts(), pytest.raises(error, match=match):
        opt.finish()
    with pytest.raises(RuntimeError, match=r"finish\(\) after finish\(\)"):
        opt.finish()
    assert len(opt.chain) == 1
    assert type(model.first) is nn.Linear
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


def test_a_knot_inside_a_knot_is_refused():
    model = Net()
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LINK, lr=0.02)
    train(opt, model, 2)
    opt.on_knot(lambda report: opt.tie())
    with pytest.raises(RuntimeError, match="a knot inside a knot"):
        opt.tie()
    assert len(opt.chain) == 1


def test_a_ledger_that_was_changed_is_noticed_before_the_weights_are():
    model = Net()
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=LINK, lr=0.02)
    train(opt, model, 5)
    opt.chain.undo()
    before = state_of(model, opt)
    with pytest.raises(ValueError, match=r"link 2 cannot follow a chain of 1 links.*opt\.undo"):
        opt.tie()
    assert same(before, state_of(model, opt))


def test_a_knot_under_inference_mode_is_refused():
    model = Net()
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LINK, lr=0.02)
    train(opt, model, 2)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"under torch\.inference_mode"):
        opt.tie()
    with torch.no_grad():
        opt.tie()


@contextlib.contextmanager
def default_interrupts():
    """Where the tests run in the background, SIGINT may be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted(real):
    def tie_(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    return tie_


def test_an_interrupt_in_the_middle_of_a_tie_waits_for_the_knot(monkeypatch):
    model, twin = Net(), Net()
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LINK, lr=0.02)
    undisturbed = ChainOptimizer(torch.optim.AdamW, twin, NeverKnots(), link=LINK, lr=0.02)
    train(opt, model, 3), train(undisturbed, twin, 3)
    with monkeypatch.context() as patch, default_interrupts():
        patch.setattr(layer, "tie_anywhere", interrupted(layer.tie_anywhere))
        with pytest.raises(KeyboardInterrupt):
            opt.tie()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    undisturbed.tie()
    assert len(opt.chain) == 1
    assert train(opt, model, 3, start=3) == train(undisturbed, twin, 3, start=3)


@pytest.mark.parametrize("fails", [False, True])
def test_a_masked_run_goes_on_where_links_are_resized(fails):
    """Its Parameters keep their room until the next link, for the base has state of that size."""

    def init(start):
        if fails and start.link == 2:
            raise ArithmeticError("mine")
        return torch.randn(start.rank, start.shape[1], generator=start.generator)

    def made(change):
        model = Net()
        link = LinkConfig(r=(4, 2), target_modules=BODY, rank_change=change, init=init)
        return model, ChainOptimizer(torch.optim.AdamW, model, StepKnots(at=[2, 5]), link=link, lr=0.02)

    (whole, first), (model, opt) = made("mask"), made("resize")
    train(first, whole, 3)
    model.load_state_dict(whole.state_dict())
    opt.load_state_dict(copy.deepcopy(first.state_dict()))
    for each, net in ((first, whole), (opt, model)):
        train(each, net, 1, start=3)
        if fails:
            with pytest.raises(ArithmeticError, match="mine"):
                train(each, net, 1, start=4)
        train(each, net, 0 if fails else 3, start=4)
    assert [p.shape[0] for p in opt.live.adapters()][::2] == ([4, 4] if fails else [2, 2])
    for name, value in model.state_dict().items():
        other = whole.state_dict()[name]
        assert torch.allclose(value, other[tuple(map(slice, value.shape))], atol=1e-6), name
