"""What a chain on quantised layers starts from and is held against: bases, other layers, what bitsandbytes does."""

import copy

import pytest
import torch
from torch import nn

from cola import Chain, LinkConfig
from tests.integrations.quantized_nets import (
    BODY,
    BOTH,
    KINDS,
    Net,
    chained,
    eight,
    four,
    inputs,
    net,
    quiet,  # noqa: F401 (a fixture)
    same,
    train,
)

bnb = pytest.importorskip("bitsandbytes")
F = bnb.functional


def test_another_base_is_refused():
    model = net()
    opt = chained(model)
    train(opt, model, 3)
    for changed, message in [
        (net(seed=1), "the weight of layer 'first' has other values"),
        (net("fp4 double"), "the chain's base has 'first.weight.quant_state.bitsandbytes__nf4', which is missing here"),
        (net("nf4"), "the chain's base has 'first.weight.nested_absmax', which is missing here"),  # the same codes
    ]:
        with pytest.raises(ValueError, match=f"wrong base: {message}"):
            Chain(opt.chain, base=opt.chain.base).apply(changed)
    scaled = net()
    scaled.second.weight.quant_state.absmax[0] ^= 1
    with pytest.raises(ValueError, match=r"'second\.weight\.absmax' has other values"):
        opt.chain.apply(scaled)
    with pytest.raises(ValueError, match="'first' was tied by 'stack', and the layer is not quantised: load the base"):
        opt.chain.apply(Net(nn.Linear), check=False)
    for base, message in [
        (Net(nn.Linear), "base has a Linear at 'first': give it quantised as the model is"),
        (Net(nn.Linear).state_dict(), r"base has no 'first\.weight\.absmax'"),
        (net(seed=1), "wrong base: the weight of layer 'first' has other values"),
    ]:
        with pytest.raises(ValueError, match=message):
            opt.undo(base)


def test_a_finished_chain_goes_on_from_the_base_and_not_from_itself():
    model = net()
    opt = chained(model)
    train(opt, model, 2)
    opt.finish()
    assert [k for k in model.state_dict() if "chain" in k] == [f"{p}.chain_{x}" for p in BODY for x in "AB"]
    with pytest.raises(ValueError, match=r"'first' carries the links of a finished chain: load the base anew"):
        chained(model)
    with pytest.raises(ValueError, match=r"'first', which carries the links of a finished chain"):
        opt.chain.apply(model, check=False)


def test_dropping_the_only_link_gives_the_plain_layers_back():
    model, base = net(), net()
    opt = chained(model)
    train(opt, model, 2)
    opt.finish(merge=False)
    assert same(model, base)
    assert type(model.first) is bnb.nn.Linear4bit


def test_evaluation_in_a_run_leaves_the_weights_and_the_gradients():
    """On CPUs with AVX512-BF16 bitsandbytes rearranges 4-bit weights in evaluation: scales in bf16, and no gradient."""
    model = net()
    flags = [model.first.support_avx512bf16_for_cpu, model.second.support_avx512bf16_for_cpu]
    before = copy.deepcopy(model.state_dict())
    opt = chained(model)
    train(opt, model, 1)
    model.eval()
    with torch.no_grad():
        model(inputs(0))
    model.train()
    train(opt, model, 1)
    assert model.first.lora_B.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    opt.finish()
    assert [model.first.support_avx512bf16_for_cpu, model.second.support_avx512bf16_for_cpu] == flags


def rearranged():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(four("nf4", False)(64, 64)).to("cpu")
    weight = model[0].weight
    weight.data, weight.quant_state = F._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    return model


class Doubled(bnb.nn.Linear4bit):
    def forward(self, x):
        return 2 * super().forward(x)


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = bnb.nn.Embedding4bit(64, 64)


def dispatched():
    model = net()
    model.first.forward = model.first.forward
    return model


REFUSED = {
    "16 bits": (lambda: net(bnb.nn.Linear8bitLt), BODY, "keeps its weight in 16 bits .* load_in_8bit"),
    "not yet": (lambda: Net(KINDS["nf4"]), BODY, "is a Linear4bit whose weight is not quantised yet"),
    "not yet, int8": (lambda: Net(eight), BODY, "is a Linear8bitLt whose weight is not quantised yet"),
    "rearranged": (rearranged, ["0"], "was rearranged by bitsandbytes for evaluation on this CPU.*: load the model"),
    "forward": (lambda: net(Doubled), BODY, "is a Doubled that overrides forward"),
    "dispatched": (dispatched, BODY, "has had its forward replaced on the instance"),
    "embedding": (Embedded, ["table"], "is bitsandbytes' Embedding4bit, whose weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_carry_a_chain_is_refused_with_the_reason(name):
    make, targets, message = REFUSED[name]
    model = make()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        chained(model, link=LinkConfig(r=2, target_modules=targets))
    assert [type(module) for module in model.modules()] == classes


def test_the_way_of_tying_is_one_of_two():
    with pytest.raises(ValueError, match="quantized='merge' is unknown: choose"):
        chained(net(), quantized="merge")


@BOTH
def test_layers_that_are_not_quantised_are_tied_as_ever(how):
    link = LinkConfig(r=2, target_modules="all-linear")
    model, reports = net(), []
    opt = chained(model, link=link, quantized=how)
    opt.on_knot(reports.append)
    train(opt, model, 7)
    opt.finish()
    roundings = {path: layer.rounding for path, layer in reports[0].layers.items()}
    assert roundings == {"first": how, "second": how, "head": "nearest"}
    assert type(model.head) is nn.Linear
    fresh = net()
    opt.chain.apply(fresh)
    assert same(fresh, model)


@BOTH
def test_an_adapter_becomes_the_first_link_of_a_quantised_base(how, tmp_path):
    model = net()
    opt = chained(model, quantized=how)
    train(opt, model, 3)
    opt.chain.to_peft(tmp_path)
    with pytest.raises(ValueError, match=r"by 'nearest', and the layer is quantised: .* from_peft\(\.\.\., rounding="):
        chained(net()).follow(Chain.from_peft(tmp_path))
    again = net()
    other = chained(again, quantized=how)
    other.follow(Chain.from_peft(tmp_path, rounding=how))
    # s·B is folded in either way, and rounded once
    assert torch.allclose(again(inputs(0)), model(inputs(0)), atol=1e-6)
    train(other, again, 3)
    assert len(other.chain) == 2


def test_a_quantised_module_is_not_trained_whole():
    model = net()
    link = LinkConfig(r=2, target_modules=["first"], modules_to_save=["second"])
    with pytest.raises(ValueError, match=r"'second' has torch\.uint8 weights \(quantised\?\), which cannot be trained"):
        chained(model, link=link)
    assert type(model.first) is bnb.nn.Linear4bit


@pytest.mark.parametrize("ways", [("stack", "requantize"), ("requantize", "stack")], ids=" then ".join)
def test_a_chain_may_go_on_the_other_way(ways, tmp_path):
    """What was stacked stays beside the codes, and what was quantised stays in them."""
    first = net()
    opt = chained(first, quantized=ways[0])
    train(opt, first, 6)
    start = Chain(list(opt.chain), base=opt.chain.base)
    model = net()
    opt = chained(model, quantized=ways[1])
    opt.follow(start)
    assert torch.equal(model(inputs(0)), first(inputs(0)))
    train(opt, model, 4)
    opt.save(tmp_path)
    states = copy.deepcopy((model.state_dict(), opt.state_dict()))
    losses = train(opt, model, 4, start=4)
    assert [link.factors["first"].rounding for link in opt.chain] == [ways[0]] * 2 + [ways[1]] * 2
    again = net()
    other = chained(again, quantized=ways[1])
    other.load(tmp_path)
    assert train(other, again, 4, start=4) == losses
    again = net()
    other = chained(again, quantized=ways[1])
    again.load_state_dict(states[0])
    other.load_state_dict(states[1])
    assert train(other, again, 4, start=4) == losses
    opt.finish()
    fresh = net()
    opt.chain.apply(fresh)
    assert same(fresh, model)
    opt.chain.undo(fresh, net())
    while len(opt.chain):
        opt.chain.undo(fresh, net())
    assert same(fresh, net())
