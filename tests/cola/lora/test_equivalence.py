"""Tying a knot changes the weights and nothing that anyone can see: property-based, over shapes, dtypes and layers."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cola import ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from tests.models import Net, loss_of, tiny_gpt2, tiny_opt, train
from tests.reference import rounded_sum

pytestmark = pytest.mark.numerics

SHAPES = {"m": st.integers(1, 24), "n": st.integers(1, 24), "r": st.integers(1, 4)}


def chained(layer, r, rounding="nearest", alpha=16.0, dropout=0.0, **kwargs):
    link = LinkConfig(r=r, lora_alpha=alpha, target_modules="all-linear", lora_dropout=dropout)
    return ChainOptimizer(torch.optim.SGD, layer, NeverKnots(), link=link, rounding=rounding, lr=0.1, **kwargs)


def linear(m, n, seed, dtype, bias, transposed):
    g = torch.Generator().manual_seed(seed)
    if transposed:
        from transformers.pytorch_utils import Conv1D

        layer = Conv1D(m, n)
    else:
        layer = nn.Linear(n, m, bias=bias)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return nn.Sequential(layer).to(dtype), g


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=30)
@given(
    **SHAPES, alpha=st.floats(0.25, 32), bias=st.booleans(), dropout=st.sampled_from([0.0, 0.3]),
    tokens=st.integers(1, 5), size=st.sampled_from([1e-3, 0.1]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_outputs_before_and_after_a_tie_agree(
    transposed, rounding, dtype, m, n, r, alpha, bias, dropout, tokens, size, seed
):
    r = min(r, m, n)
    model, g = linear(m, n, seed, dtype, bias, transposed)
    opt = chained(model, r, rounding, alpha, dropout, seed=seed)
    layer, s = model[0], model[0].scaling
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(m, r, generator=g) * size)
    x = torch.randn(tokens, n, generator=g).to(dtype)
    model.eval()
    with torch.no_grad():
        W = layer.weight.double().t() if transposed else layer.weight.double()
        # all sizes that are summed, as sums of absolute values
        sizes = x.double().abs() @ (W.abs() + s * layer.lora_B.double().abs() @ layer.lora_A.double().abs()).t()
        sizes = sizes + (0 if layer.bias is None else layer.bias.double().abs())
        before = model(x)
        opt.tie()
        after = model(x)
        opt.finish()
        plain = model(x)
    # γ_k with k roundings: n + r in the two products before, n after, the tie's one (a unit at random), the casts of
    # A and B, the addition of the two parts and of the bias
    bound = (2 * n + r + 6) * torch.finfo(dtype).eps * sizes + torch.finfo(dtype).smallest_normal
    assert ((before.double() - after.double()).abs() <= bound).all()
    assert torch.equal(after, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=30)
@given(**SHAPES, links=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_the_weight_is_the_float64_sum_of_all_links(dtype, m, n, r, links, seed):
    r = min(r, m, n)
    model, g = linear(m, n, seed, dtype, True, False)
    start = model[0].weight.detach().clone()
    opt = chained(model, r, "nearest", seed=seed)
    for _ in range(links):
        with torch.no_grad():
            model[0].lora_B.copy_(torch.randn(m, r, generator=g) * 0.1)
        opt.tie()
    updates = [link.factors["0"].delta() for link in opt.chain]
    exact = rounded_sum(start, updates)
    largest = start.double().abs() + sum(u.abs() for u in updates)
    products = sum(
        link.factors["0"].scaling * link.factors["0"].B.double().abs() @ link.factors["0"].A.double().abs()
        for link in opt.chain
    )
    compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = links * torch.finfo(dtype).eps / 2 * largest * 1.01 + compute * ((r + 2) * products + 2 * links * largest)
    assert ((model[0].weight.double() - exact).abs() <= bound).all()


@settings(max_examples=40)
@given(**SHAPES, links=st.integers(2, 5), seed=st.integers(0, 2**16))
def test_a_chain_of_ties_is_one_tie_of_the_concatenated_links(m, n, r, links, seed):
    r = min(r, m, n)
    model, g = linear(m, n, seed, torch.float64, True, False)
    once = copy.deepcopy(model)
    opt = chained(model, r, seed=seed)
    for _ in range(links):
        with torch.no_grad():
            model[0].lora_B.copy_(torch.randn(m, r, generator=g))
        opt.tie()
    found = [link.factors["0"] for link in opt.chain]
    A, B = torch.cat([f.A for f in found], 0), torch.cat([f.scaling * f.B for f in found], 1)
    from cola.knot.tie import tie_

    tie_(once[0].weight.detach(), B, A, 1.0)
    sizes = once[0].weight.abs() + B.abs() @ A.abs()
    assert (
        (model[0].weight - once[0].weight).abs() <= (links * r + links + 2) * torch.finfo(torch.float64).eps * sizes
    ).all()


@pytest.mark.parametrize("make", [tiny_opt, tiny_gpt2], ids=["OPT", "GPT-2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_a_transformer_keeps_its_function_over_knots_and_its_class_afterwards(make, dtype, targets):
    model = make().to(dtype).eval()
    base, kind, keys = copy.deepcopy(model), type(model), list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    opt = ChainOptimizer(
        torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(r=(4, 2, 4), target_modules=targets), lr=1e-2
    )
    ids = torch.arange(24).view(2, 12) % 32
    drift = []

    def logits():
        with torch.no_grad():
            return model(input_ids=ids).logits.float()

    for step in range(6):
        model(input_ids=ids, labels=ids).loss.backward()
        if step % 2:
            opt.policy, policy = NeverKnots(), opt.policy
            opt.step()
            opt.policy = policy
            before = logits()
            opt.tie()
            drift.append(((logits() - before).norm() / before.norm()).item())
        else:
            opt.step()
        opt.zero_grad()
    opt.finish()
    # one rounding of each weight and a few of each activation, in a network of two blocks: eps times a small number
    assert max(drift) <= 8 * torch.finfo(dtype).eps
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())
    opt.chain.apply(base)
    assert all(torch.equal(a, b) for a, b in zip(base.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("upto", [0, 1, 2, 3])
def test_applying_part_of_a_chain_stops_at_that_link(upto):
    model = Net()
    base, snapshots = copy.deepcopy(model), [copy.deepcopy(model.state_dict())]
    opt = ChainOptimizer(
        torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(r=2, target_modules=["first"]), lr=0.05
    )
    opt.on_knot(
        lambda report: snapshots.append({k: v.clone() for k, v in model.state_dict().items() if "lora" not in k})
    )
    train(opt, model, 6)
    opt.chain.apply(base, upto=upto)
    assert all(torch.equal(base.state_dict()[k], v) for k, v in snapshots[upto].items())


def test_the_loss_is_continuous_across_a_knot_on_the_same_batch():
    model = Net(dtype=torch.float64)
    opt = ChainOptimizer(
        torch.optim.AdamW, model, NeverKnots(), link=LinkConfig(r=2, target_modules="all-linear"), lr=0.05
    )
    train(opt, model, 5, dtype=torch.float64)
    before = loss_of(model, 9, torch.float64).item()
    opt.tie()
    assert loss_of(model, 9, torch.float64).item() == pytest.approx(before, rel=1e-13)
