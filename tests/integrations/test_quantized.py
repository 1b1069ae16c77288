"""bitsandbytes' quantised layers in a chain: stacked links lose nothing, and each way of tying resumes and undoes."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from cola import Chain, LinkConfig, NeverKnots, StepKnots
from cola.knot.tie import KnotError
from cola.lora import quantized
from cola.lora.link import per_cent
from cola.lora.quantized_codes import codes_of
from cola.lora.stacked import StackedLinear
from tests.integrations.quantized_nets import (
    BODY,
    BOTH,
    EACH,
    chained,
    four,
    inputs,
    net,
    quiet,  # noqa: F401 (a fixture)
    same,
    train,
)

bnb = pytest.importorskip("bitsandbytes")


@EACH
@BOTH
def test_a_chain_is_trained_tied_saved_resumed_applied_and_undone_bit_for_bit(kind, how, tmp_path):
    model, base = net(kind), net(kind)
    opt = chained(model, quantized=how)
    train(opt, model, 7)
    opt.save(tmp_path)
    states = copy.deepcopy((model.state_dict(), opt.state_dict()))
    losses = train(opt, model, 4, start=7)
    assert len(opt.chain) == 3

    resumed = net(kind)
    other = chained(resumed, quantized=how)
    other.load(tmp_path)
    assert train(other, resumed, 4, start=7) == losses
    for first in ("model", "optimizer"):
        resumed = net(kind)
        other = chained(resumed, quantized=how)
        for load, state in [(resumed, states[0]), (other, states[1])][:: 1 if first == "model" else -1]:
            load.load_state_dict(copy.deepcopy(state))
        assert train(other, resumed, 4, start=7) == losses

    opt.finish()
    assert [factor.rounding for link in opt.chain for factor in link.factors.values()] == [how] * 8
    assert isinstance(model.first, StackedLinear) == (how == "stack")
    opt.chain.save(tmp_path / "chain")
    chain, fresh = Chain.load(tmp_path / "chain"), net(kind)
    chain.apply(fresh)
    assert same(fresh, model)
    assert torch.equal(fresh(inputs(0)), model(inputs(0)))
    for length in (3, 2, 1, 0):
        chain.undo(fresh, base if length % 2 else base.state_dict())
        again = net(kind)
        Chain(opt.chain[:length]).apply(again, check=False)
        assert same(fresh, again)
    assert same(fresh, base)
    assert type(fresh.first) is type(base.first)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_stacked_knot_keeps_the_function(kind, dtype):
    """Before: ``s·(x Aᵀ) Bᵀ``; after: ``(x Āᵀ) B̄ᵀ`` with s in B̄, in x's dtype with sums in fp32.

    Both are within a few roundings of the exact product, of its terms' magnitudes: one for each of the factors and for
    the inner product, s·B once more, and one for adding to the output.
    """
    module = net(kind if kind == "int8" else four("nf4", True, compute=dtype)).first
    model = nn.Sequential(module)
    opt = chained(model, NeverKnots(), link=LinkConfig(r=2, lora_alpha=3, target_modules="all-linear"))
    with torch.no_grad():
        module.lora_B.normal_(generator=torch.Generator().manual_seed(1))
    x = inputs(0).to(dtype)
    before = model(x).detach()
    A, B, s = module.lora_A.detach().abs(), module.lora_B.detach().abs(), module.scaling
    terms = s * x.float().abs() @ A.T @ B.T
    report = opt.finish()
    after = model(x).detach()
    eps, exact = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    bound = 8 * eps * (terms + before.float().abs() + after.float().abs()) + 2 * (72 + 2) * exact * terms
    assert ((after.float() - before.float()).abs() <= bound).all()
    # s·B is rounded once to fp32, half a unit in the last place of each element
    assert report.lost_norm <= exact / 2 * (s * B @ A).norm()
    assert report.delta_norm == pytest.approx((module.chain_B @ module.chain_A).norm().item(), rel=1e-5)


@EACH
def test_the_fast_forward_is_the_slow_twins(kind):
    """Against the decoded weight; gradients too. Two links are stacked, the third is live."""
    model = net(kind)
    opt = chained(model)
    train(opt, model, 8)
    module, x = model.first, inputs(0).requires_grad_()
    fast, slow = module(x), module.reference(x)
    parameters = [x, module.lora_A, module.lora_B]
    one, two = (torch.autograd.grad(y.square().sum(), parameters) for y in (fast, slow))
    # fp32 sums of 72 products, in another order
    assert torch.allclose(fast, slow, rtol=1e-4, atol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(one, two))
    assert not module.chain_A.requires_grad


def test_what_each_way_loses_is_reported():
    reports = {}
    for how in quantized.QUANTIZED:
        model = net()
        opt = chained(model, quantized=how)
        train(opt, model, 2)
        reports[how] = opt.finish()
        for path, layer in reports[how].layers.items():
            module = getattr(model, path)
            weight = codes_of(module).values()
            if how == "stack":
                weight = weight + module.chain_B @ module.chain_A
            assert layer.share == pytest.approx(layer.delta_norm / weight.norm().item(), rel=1e-5)  # fp32 sums
        assert f"at most {per_cent(reports[how].share)} of a layer's ‖W‖" in str(reports[how])
    assert reports["stack"].delta_norm == reports["requantize"].delta_norm
    assert reports["stack"].lost_norm < 1e-7 * reports["stack"].delta_norm
    # nf4's steps are wider than a small update: here the codes lose more than a tenth of a large one
    assert reports["requantize"].lost_norm > 0.1 * reports["requantize"].delta_norm
    assert "lost to rounding" in str(reports["requantize"])


def test_the_stack_costs_an_adapters_memory_and_trains_the_live_link_alone():
    model = net()
    opt = chained(model, StepKnots(every=1))
    weight = model.first.weight
    train(opt, model, 5)
    assert model.first.weight is weight
    assert (model.first.chain_A.shape, model.first.chain_B.shape) == ((10, 72), (40, 10))
    assert [p.shape for p in model.parameters() if p.requires_grad] == [(2, 72), (40, 2), (2, 40), (56, 2)]


def test_requantised_chains_need_not_keep_their_links_until_they_are_resumed():
    models = [net(), net()]
    opts = [chained(m, quantized="requantize", keep_links=keep) for m, keep in zip(models, (True, False))]
    assert train(opts[0], models[0], 8) == train(opts[1], models[1], 8)
    other = chained(net(), quantized="requantize", keep_links=False)
    with pytest.raises(ValueError, match="'requantize' needs all links at every knot"):
        other.load_state_dict(opts[1].state_dict())
    state = copy.deepcopy(opts[0].state_dict())
    with pytest.raises(ValueError, match=r"from the original codes .* the weight of layer 'first' has other values"):
        chained(net(seed=1), quantized="requantize").load_state_dict(state)
    with pytest.raises(ValueError, match=r"quantized differs \(saved 'requantize', here 'stack'\)"):
        chained(net()).load_state_dict(state)


@BOTH
def test_a_knot_is_whole_or_not_at_all(how):
    model = net("int8")
    opt = chained(model, quantized=how)
    train(opt, model, 1)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.second.lora_B[0, 0] = math.nan
    with pytest.raises(KnotError, match="lora_B of layer 'second' has non-finite values"):
        opt.tie()
    with torch.no_grad():
        model.second.lora_B[0, 0] = 1e30
    if how == "requantize":
        with pytest.raises(KnotError, match=r"'second' would get a W .* beyond 65504, the largest number that"):
            opt.tie()
    with torch.no_grad():
        model.second.lora_B[0, 0] = 3e38  # and s = 1.5
    with pytest.raises(KnotError, match="'second' would get an s·B beyond the largest number"):
        opt.tie()
    with torch.no_grad():
        model.second.lora_B.copy_(before["second.lora_B"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    opt.tie()


@BOTH
def test_undo_and_follow_on_a_running_chain(how):
    model = net()
    opt = chained(model, quantized=how)
    train(opt, model, 7)
    link = opt.undo(net())
    assert link.index == 1
    assert len(opt.chain) == 1
    fresh = net()
    other = chained(fresh, quantized=how)
    other.follow(Chain(opt.chain))
    assert torch.equal(model.first.weight, fresh.first.weight)
    x = inputs(0)
    # both begin link 1 from its own draw, B = 0
    assert torch.equal(model(x), fresh(x))
    train(other, fresh, 3)
    assert len(other.chain) == 2


@BOTH
@pytest.mark.parametrize("copying", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_copies_go_on_alone(how, copying, kind):
    model = net(kind)
    opt = chained(model, quantized=how)
    train(opt, model, 4)
    twin, other = copying((model, opt))
    assert train(opt, model, 4, start=4) == train(other, twin, 4, start=4)
    opt.finish()
    x = inputs(0)
    assert torch.equal(copying(model)(x), model(x))


@BOTH
def test_with_8bit_adam_rank_steps_biases_and_a_head(how):
    link = LinkConfig(r=(3, 2, 1), target_modules=BODY, bias="lora_only", modules_to_save=["head"], lora_dropout=0.1)
    model = net()
    opt = chained(model, base=bnb.optim.Adam8bit, link=link, quantized=how, min_8bit_size=1)
    train(opt, model, 10)
    opt.finish()
    assert [entry.rank for entry in opt.chain] == [3, 2, 1, 1]
    fresh = net()
    opt.chain.apply(fresh)
    assert same(model, fresh)


def test_under_autocast():
    model = net()
    opt = chained(model)
    for step in range(4):
        x = inputs(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert len(opt.chain) == 1


class Counted:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@BOTH
def test_compiled_models_train_the_same_and_stacking_costs_a_graph_per_knot(how):
    torch._dynamo.reset()
    (model, opt), (plain, other) = [(m, chained(m, StepKnots(every=2), quantized=how)) for m in (net(), net())]
    backend, counts, losses = Counted(), [], []
    compiled = torch.compile(model, backend=backend)
    for step in range(6):
        losses += train(opt, compiled, 1, start=step)
        counts.append(backend.graphs)
    torch._dynamo.reset()
    assert losses == pytest.approx(train(other, plain, 6), abs=1e-5)
    assert [count - counts[1] for count in counts[1:]] == ([0, 1, 1, 2, 2] if how == "stack" else [0] * 5)


def test_the_optimizers_state_without_the_models_is_noticed():
    """Stacked links are in the model's state; the codes alone would not tell."""
    model = net()
    opt = chained(model)
    train(opt, model, 4)
    fresh = net()
    other = chained(fresh)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    with pytest.raises(RuntimeError, match="the model's weights are not those that the optimizer's state was saved"):
        train(other, fresh, 1)


def test_pefts_layers_for_plain_ones_carry_stacked_links_too():
    """PEFT gives a quantised layer its own class only in models that say that they are quantised."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(net(), peft.LoraConfig(r=2, lora_alpha=3, target_modules=BODY))
    opt = chained(model, link=LinkConfig())
    train(opt, model, 4)
    before = model(inputs(0))
    opt.finish()
    assert torch.allclose(model(inputs(0)), before, atol=1e-6)
    fresh = net()
    opt.chain.apply(fresh)
    assert torch.allclose(fresh(inputs(0)), before, atol=1e-6)


def pair(start):
    out, inner = start.shape
    A = torch.randn(start.rank, inner, generator=start.generator)
    return A, torch.randn(out, start.rank, generator=start.generator) / 8


@BOTH
@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_links_that_start_at_a_product_resume_and_undo_bit_for_bit(kind, how, tmp_path):
    def made(seed=0):
        model = net(kind, seed)
        link = LinkConfig(r=2, lora_alpha=3, target_modules=BODY, init=pair)
        return model, chained(model, StepKnots(at=[2, 4]), torch.optim.SGD, link, quantized=how)

    model, opt = made()
    train(opt, model, 6)
    opt.finish()
    fresh = net(kind)
    opt.chain.apply(fresh)
    assert same(fresh, model)
    for stop in (0, 4):
        for way in ("directory", "model first", "optimizer first"):
            (part, first), (resumed, second) = made(), made()
            train(first, part, stop)
            states = [(resumed, copy.deepcopy(part.state_dict())), (second, copy.deepcopy(first.state_dict()))]
            if way == "directory":
                first.save(tmp_path / f"{stop}")
                second.load(tmp_path / f"{stop}")
            else:
                for load, state in states[:: 1 if way == "model first" else -1]:
                    load.load_state_dict(state)
            train(second, resumed, 6 - stop, start=stop)
            second.finish()
            assert same(resumed, model), (stop, way)
    _, foreign = made(seed=3)
    foreign.save(tmp_path / "foreign")
    again, third = made()
    with pytest.raises(ValueError, match="wrong base"):
        third.load(tmp_path / "foreign")
    train(third, again, 6)
    third.finish()
    assert same(again, model)
    dropped, fourth = made()
    fourth.finish(merge=False)
    assert same(dropped, net(kind))
    opt.chain.undo(model, net(kind))
    fresh = net(kind)
    opt.chain.apply(fresh)
    assert same(fresh, model)
