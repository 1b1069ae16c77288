"""bitsandbytes' quantised layers: links stacked beside the codes lose nothing, re-quantised ones what is reported."""

import copy
import logging
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cola import Chain, ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from cola.adapters import quantized
from cola.adapters.codes import codes_of
from cola.adapters.stacked import StackedLinear
from cola.tie import KnotError

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


# the codes


@EACH
def test_decoding_is_bitsandbytes_own(kind):
    for name in BODY:
        module = getattr(net(kind), name)
        # int8's scale may be divided by 127 before or after it multiplies the code: one rounding of fp32 each
        tolerance = 2 * torch.finfo(torch.float32).eps if kind == "int8" else 0
        assert torch.allclose(codes_of(module).values(), decoded(module), rtol=tolerance, atol=0)


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double=st.booleans(),
    blocksize=st.sampled_from([32, 64, 128]),
    block=st.sampled_from([1, 200, 1 << 18]),
    seed=st.integers(0, 5),
)
def test_encoding_in_blocks_is_bitsandbytes_own_in_one_piece(shape, quant_type, double, blocksize, block, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    module = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type=quant_type, compress_statistics=double)
    module.weight.data, module.weight.blocksize = torch.zeros(shape), blocksize
    module, whole = module.to("cpu"), None
    codes = codes_of(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cola.adapters.codes._BLOCK", block)
        found = codes.join([codes.encode(weight[rows]) for rows in codes.blocks()])
    whole, state = F.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double, quant_type=quant_type)
    theirs = state.as_dict(packed=True)
    assert torch.equal(found["weight"].view(-1), whole.view(-1))
    assert all(torch.equal(found[f"weight.{name}"], value) for name, value in theirs.items())


# tying


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
    fast, slow = module(x), module.composed(x)
    parameters = [x, module.lora_A, module.lora_B]
    one, two = (torch.autograd.grad(y.square().sum(), parameters) for y in (fast, slow))
    # fp32 sums of 72 products, in another order
    assert torch.allclose(fast, slow, rtol=1e-4, atol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(one, two))
    assert not module.chain_A.requires_grad


@EACH
def test_requantised_codes_are_those_of_the_original_weight_and_all_links(kind):
    """In full and by bitsandbytes' own functions: the same codes, and the reported loss is what they miss."""
    model, reports = net(kind), []
    opt = chained(model, quantized="requantize")
    opt.on_knot(reports.append)
    train(opt, model, 9)
    base = net(kind)
    for name in BODY:
        module, original = getattr(model, name), getattr(base, name)
        # ΣΔ as the links are stacked, in fp32
        stacked = opt.live.originals[name]
        weight = torch.addmm(codes_of(original).values(), stacked.B, stacked.A)
        assert torch.allclose(stacked.B @ stacked.A, opt.chain.delta(name).float(), atol=1e-5)
        if kind == "int8":
            codes, scales, _ = F.int8_vectorwise_quant(weight.half())
            assert torch.equal(module.weight.data, codes)
            assert torch.equal(codes_of(module).stored()["SCB"], scales)
        else:
            state = original.weight.quant_state
            codes, new = F.quantize_4bit(
                weight, blocksize=64, compress_statistics=state.nested, quant_type=state.quant_type
            )
            assert torch.equal(module.weight.data.view(torch.uint8).view(-1), codes.view(-1))
            assert torch.equal(module.weight.quant_state.absmax, new.absmax)
        missed = (codes_of(module).values() - weight).norm().item()
        assert reports[-1].layers[name].lost_norm == pytest.approx(missed, rel=1e-5)
    assert reports[-1].lost_norm == pytest.approx(math.hypot(*(x.lost_norm for x in reports[-1].layers.values())))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_groups_error_is_at_most_half_a_step_of_its_codes(kind):
    """And so what a re-quantised chain has lost does not grow with the number of knots."""
    model, reports = net(kind), []
    opt = chained(model, StepKnots(every=1), quantized="requantize")
    opt.on_knot(reports.append)
    train(opt, model, 12)
    for report in reports:
        assert report.lost_norm < 2 * reports[0].lost_norm
    for name in BODY:
        state = getattr(model, name).weight.quant_state
        step = state.code.sort().values.diff().max().item() / 2
        limit = step * (state.absmax.square().sum() * 64).sqrt().item()
        assert reports[-1].layers[name].lost_norm <= limit


def test_a_link_that_adds_nothing_gives_the_same_codes():
    model, base = net("nf4"), net("nf4")
    opt = chained(model, quantized="requantize")
    opt.tie()
    opt.finish()
    assert same(model, base)


def test_what_each_way_loses_is_reported():
    reports = {}
    for how in quantized.QUANTIZED:
        model = net()
        reports[how] = chained(model, quantized=how)
        train(reports[how], model, 2)
        reports[how] = reports[how].finish()
    assert reports["stack"].delta_norm == reports["requantize"].delta_norm
    assert reports["stack"].lost_norm < 1e-7 * reports["stack"].delta_norm
    # nf4's steps are wider than a small update: here the codes lose more than a tenth of a large one
    assert reports["requantize"].lost_norm > 0.1 * reports["requantize"].delta_norm
    assert "lost to rounding" in str(reports["requantize"])


@pytest.mark.parametrize(
    ("kind", "share", "kept", "error"),
    [
        ("nf4", 1e-2, 0, 1.4),
        ("nf4", 0.3, 1, 0.3),
        ("fp4", 1e-2, 0, 1.4),
        ("int8", 1e-3, 0, 1.2),
        ("int8", 1e-2, 1, 0.4),
    ],
)
def test_codes_keep_all_of_a_large_update_and_nothing_of_a_small_one(kind, share, kept, error):
    """The table in integrations/README.md; a mean over 256² weights, of which a tenth is slack."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = KINDS[kind](256, 256).to("cpu")
    before = codes_of(module).values()
    A, B = torch.randn(8, 256, generator=generator), torch.randn(256, 8, generator=generator)
    s = (share * before.norm() / (B @ A).norm()).item()
    (tie,) = quantized.tie(module, [(A, B, s)], quantized.OriginalWeight.of(module))
    moved, update = codes_of(module).values() - before, s * B @ A
    assert (moved * update).sum() / update.norm() ** 2 == pytest.approx(kept, abs=0.1)
    assert tie.lost / tie.delta == pytest.approx(error, abs=0.1)


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


# bases, and what bitsandbytes does to them


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
    "forward": (lambda: net(Doubled), BODY, "is a Doubled with a forward of its own"),
    "dispatched": (dispatched, BODY, "has had its forward replaced on the instance"),
    "embedding": (Embedded, ["table"], "is a Embedding4bit: links go on nn.Linear"),
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


def test_small_links_that_add_up_come_through_because_the_original_weight_is_where_it_starts():
    """Thirty links of 1 % of ‖W‖ in one direction: none is seen at first, and their sum is there in the end."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = KINDS["nf4"](256, 256).to("cpu")
    before, origin, kept = codes_of(module).values(), quantized.OriginalWeight.of(module), []
    A, B = torch.randn(8, 256, generator=generator), torch.randn(256, 8, generator=generator)
    s = (0.01 * before.norm() / (B @ A).norm()).item()
    for links in range(1, 31):
        quantized.tie(module, [(A, B, s)], origin)
        total = links * s * B @ A
        kept.append(((codes_of(module).values() - before) * total).sum() / total.norm() ** 2)
    assert kept[0] < 0.1
    assert kept[-1] == pytest.approx(1, abs=0.1)


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


def test_a_quantised_module_is_not_trained_whole():
    model = net()
    link = LinkConfig(r=2, target_modules=["first"], modules_to_save=["second"])
    with pytest.raises(ValueError, match=r"'second' has torch\.uint8 weights \(quantised\?\), which cannot be trained"):
        chained(model, link=link)
    assert type(model.first) is bnb.nn.Linear4bit


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


class Largest(TorchDispatchMode):
    """The most elements of any floating-point tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_requantising_makes_no_matrix_of_the_weights_size(kind, monkeypatch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = KINDS[kind](256, 512).to("cpu")
    monkeypatch.setattr("cola.adapters.codes._BLOCK", 1 << 12)
    pair = torch.randn(2, 256), torch.randn(512, 2), 0.1
    with Largest() as made:
        quantized.tie(module, [pair], quantized.OriginalWeight.of(module))
        assert quantized.obstacle(module, [pair], quantized.OriginalWeight.of(module)) is None
    # blocks of 16 rows; and the scales, one per 64 codes or per row
    assert 0 < made.elements <= 1 << 12


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
