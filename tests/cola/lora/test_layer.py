"""The adapted layer: its fast path against its slow twin, and no trace of it afterwards."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cola.lora.kinds import is_linear, known_kind, refusal
from cola.lora.layer import LoRALinear, LowRankLinear, _masked, kept, share_kept

pytestmark = pytest.mark.numerics


def adapted(out=5, inner=7, r=3, dtype=torch.float64, bias=True, seed=0, scaling=1.7, dropout=0.0, conv1d=False):
    g = torch.Generator().manual_seed(seed)
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        layer = Conv1D(out, inner)
    else:
        layer = nn.Linear(inner, out, bias=bias)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=g).to(dtype)
        p.requires_grad_(False)
    layer.__class__ = known_kind(layer).over(type(layer))
    factor = torch.float64 if dtype == torch.float64 else torch.float32
    layer.attach(
        torch.randn(r, inner, generator=g, dtype=factor),
        torch.randn(out, r, generator=g, dtype=factor),
        scaling,
        dropout,
    )
    return layer


def inputs(layer, *lead, seed=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, type(layer).shape(layer)[1], generator=g).to(dtype).requires_grad_()


def grads(fn, layer, x):
    layer.zero_grad()
    y = fn(x)
    upstream = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).to(y.dtype).view(y.shape)
    found = torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], upstream)
    return [y, *found]


@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
@given(
    out=st.integers(1, 9), inner=st.integers(1, 9), r=st.integers(1, 4), bias=st.booleans(),
    lead=st.sampled_from([(), (1,), (4,), (2, 3), (2, 0), (2, 3, 2)]), train_bias=st.booleans(),
)  # fmt: skip
def test_fast_path_equals_composed(conv1d, out, inner, r, bias, lead, train_bias):
    layer = adapted(out, inner, r, bias=bias, conv1d=conv1d)
    if layer.bias is not None:
        layer.bias.requires_grad_(train_bias)
    x = inputs(layer, *lead)
    for fast, slow in zip(grads(layer, layer, x), grads(layer.reference, layer, x)):
        assert fast.shape == slow.shape
        # float64, at most 9·(…) terms of size ≤ ~4³·1.7: a few hundred roundings of 2e-16 relative to ~1e2
        assert torch.allclose(fast, slow, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
def test_gradients_are_laid_out_as_their_parameters(conv1d):
    """Whoever flattens them by `view`, fused optimizers and buckets want that; the backward makes B's transposed."""
    layer = adapted(conv1d=conv1d)
    factors = [layer.lora_A, layer.lora_B]
    for factor, found in zip(factors, torch.autograd.grad(layer(inputs(layer, 4)).sum(), factors)):
        assert found.stride() == factor.stride()
    for _ in range(2):  # stored, then added to
        layer(inputs(layer, 4)).sum().backward()
        assert layer.lora_A.grad.stride() == layer.lora_A.stride()
        assert layer.lora_B.grad.stride() == layer.lora_B.stride()


def test_a_batch_without_rows_has_zero_gradients():
    layer = adapted()
    layer(inputs(layer, 0)).sum().backward()
    for p in (layer.lora_A, layer.lora_B):
        assert torch.equal(p.grad, torch.zeros_like(p))


def test_what_lends_its_shape_alone_may_hold_anything():
    """`addmm` with beta=0 reads no value of its first argument: a zero link passes no NaN of A on."""
    layer = adapted()
    with torch.no_grad():
        layer.lora_A.fill_(float("nan"))
        layer.lora_B.zero_()
    found = torch.autograd.grad(layer(inputs(layer, 4)).sum(), [layer.lora_A])
    assert torch.equal(found[0], torch.zeros_like(found[0]))


def test_what_lends_its_shape_alone_has_no_second_derivative():
    layer = adapted()
    y = layer(inputs(layer, 4))
    (first,) = torch.autograd.grad(y.sum(), layer.lora_B, create_graph=True)
    assert torch.autograd.grad(first.sum(), layer.lora_B, allow_unused=True) == (None,)
    direction = torch.zeros_like(layer.lora_A)
    direction[0, 0] = torch.inf
    found, expected = (
        torch.autograd.grad(torch.autograd.grad(fn(inputs(layer, 4)).square().sum(), layer.lora_A, create_graph=True),
                            layer.lora_A, direction)[0]
        for fn in (layer, layer.reference)
    )  # fmt: skip
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("trained", ["AB", "A", "B"])
def test_gradients_to_second_order(conv1d, trained):
    layer = adapted(3, 4, 2, conv1d=conv1d)
    layer.lora_A.requires_grad_("A" in trained)
    layer.lora_B.requires_grad_("B" in trained)
    weight = layer.weight.t() if conv1d else layer.weight
    x = inputs(layer, 2)
    args = (x, weight, layer.bias.clone().requires_grad_(), layer.lora_A, layer.lora_B, 0.7)
    assert torch.autograd.gradcheck(LowRankLinear.apply, args)
    assert torch.autograd.gradgradcheck(LowRankLinear.apply, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_fp32_follow_float64(dtype):
    """Outputs and gradients lie within the rounding of their own dtype of the float64 ones."""
    low = adapted(64, 48, 4, dtype=dtype)
    high = adapted(64, 48, 4, dtype=torch.float64)
    for p, q in zip(low.parameters(), high.parameters()):
        q.data = p.data.double()
    x = inputs(low, 16, dtype=dtype)
    eps = torch.finfo(dtype).eps
    names = ["y", "x", "A", "B"]
    for name, a, b in zip(names, grads(low, low, x), grads(high, high, x.detach().double().requires_grad_())):
        assert a.dtype == (dtype if name in "yx" else torch.float32)
        # γ_n for the longest sum (64 terms) would be 64·eps·Σ|terms|; in norm, errors of random sign add as the root
        assert (a.double() - b).norm() <= 8 * eps * b.norm()


def test_saved_for_backward_is_the_input_and_the_reduced_input():
    layer = adapted(32, 48, 4, dtype=torch.float32)
    x = inputs(layer, 100, dtype=torch.float32)
    known = {layer.weight.data_ptr(), layer.lora_A.data_ptr(), layer.lora_B.data_ptr(), x.data_ptr()}
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    extra = [t for t in saved if t.data_ptr() not in known]
    assert [tuple(t.shape) for t in extra] == [(100, 4)]


def test_dropout_acts_on_the_link_alone_and_only_in_training():
    layer = adapted(dropout=0.5)
    x = inputs(layer, 6)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    layer.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dropped = (nn.functional.dropout(torch.ones_like(x), 0.5)) * x
        torch.manual_seed(0)
        slow = base + 1.7 * dropped @ layer.lora_A.t() @ layer.lora_B.t()
        assert torch.allclose(layer.reference(x), slow, atol=1e-12)
        torch.manual_seed(0)
        mask = kept(x, 0.5, int(torch.randint(1 << 62, ()))) != 0
        torch.manual_seed(0)
        fast = base + 1.7 * (mask * x / 0.5) @ layer.lora_A.t() @ layer.lora_B.t()
        assert torch.allclose(layer(x), fast, atol=1e-12)
        assert 0 < mask.sum() < mask.numel()
        assert not torch.allclose(layer(x), fast, atol=1e-12)  # the next mask is another
    layer.eval()
    assert torch.allclose(layer(x), base + 1.7 * x @ layer.lora_A.t() @ layer.lora_B.t(), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout", [1e-6, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_the_share_that_dropout_keeps(dropout, dtype):
    like = torch.empty(1000, 1001, dtype=dtype)  # no multiple of four
    bits, share = kept(like, dropout, 3), share_kept(dropout)
    assert share == pytest.approx(1 - dropout, abs=2.0**-15)
    assert share > 0
    assert set(bits.unique().tolist()) <= {0, -1}
    assert abs((bits != 0).double().mean() - share) <= 5 * (share * (1 - share) / bits.numel()) ** 0.5
    assert torch.equal(bits, kept(like, dropout, 3))
    odd = torch.tensor([math.nan, math.inf, -0.0, 3.0], dtype=dtype)
    mask = torch.tensor([0, 0, -1, -1]).to(bits.dtype)
    with torch.no_grad():
        assert _masked(odd, mask).tolist() == [0.0, 0.0, 0.0, 3.0]


def test_gradients_of_dropout_to_second_order():
    layer = adapted(3, 4, 2)
    args = (inputs(layer, 2), layer.weight, layer.bias, layer.lora_A, layer.lora_B)

    def apply(*args):  # the same mask at every call
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return LowRankLinear.apply(*args, 0.7, 0.5)

    assert torch.autograd.gradcheck(apply, args)
    assert torch.autograd.gradgradcheck(apply, args)


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_under_activation_checkpointing(reentrant):
    layer = adapted(dropout=0.5).train()
    x, found = inputs(layer, 6), []
    for again in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant) if again else layer(x)
            layer.zero_grad()
            y.square().sum().backward()
        found.append([y, x.grad, layer.lora_A.grad, layer.lora_B.grad])
        x.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_less_is_saved_for_backward_than_by_peft(dtype, dropout):
    """With dropout about half: the input is kept, and the mask's seed, but neither the mask nor the product."""
    peft = pytest.importorskip("peft")
    layer = adapted(64, 48, 4, dtype=dtype, dropout=dropout).train()
    plain = nn.Sequential(nn.Linear(48, 64).to(dtype))
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=["0"], lora_dropout=dropout), plain, adapter_name="default"
    ).train()
    x = inputs(layer, 100, dtype=dtype)
    ours, other = saved_bytes(layer, x), saved_bytes(theirs, x)
    assert ours <= other
    if dropout:
        assert ours <= 0.6 * other


def saved_bytes(module, x):
    """Bytes of the distinct storages that a forward pass keeps, without the parameters'."""
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t  # keeps it alive, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in known)


def test_dropout_in_a_compiled_layer():
    layer = adapted(16, 12, 3, dtype=torch.float32, dropout=0.5).train()
    compiled = torch.compile(lambda t: layer(t), backend="aot_eager", fullgraph=True)
    x = inputs(layer, 5, dtype=torch.float32)
    assert not torch.equal(compiled(x), compiled(x))
    assert torch.equal(compiled(x).isfinite(), torch.ones(5, 16, dtype=torch.bool))


def test_autocast_uses_its_dtype():
    layer = adapted(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(inputs(layer, 4, dtype=torch.float32))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


def test_a_base_weight_that_is_trained_itself_gets_its_gradient():
    layer = adapted()
    layer.weight.requires_grad_()
    layer(inputs(layer, 4)).sum().backward()
    assert layer.weight.grad is not None


class Renamed(nn.Linear):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("kind", [nn.Linear, Renamed])
def test_detaching_leaves_no_trace(kind):
    layer = kind(4, 3)
    before, calls = set(vars(layer)), []
    layer.register_forward_hook(lambda *a: calls.append(1))
    keys, params = list(layer.state_dict()), list(layer.parameters())
    layer.__class__ = known_kind(layer).over(type(layer))
    layer.attach(torch.zeros(2, 4), torch.zeros(3, 2), 1.0, 0.0)
    assert isinstance(layer, kind)
    assert isinstance(layer, LoRALinear)
    assert list(layer.state_dict()) == [*keys, "lora_A", "lora_B"]
    layer(torch.zeros(1, 4))
    layer.detach()
    assert type(layer) is kind
    assert set(vars(layer)) == before
    assert list(layer.state_dict()) == keys
    assert all(a is b for a, b in zip(layer.parameters(), params))
    layer(torch.zeros(1, 4))
    assert len(calls) == 2


@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize(
    "copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(conv1d, copying):
    layer = adapted(conv1d=conv1d)
    twin = copying(layer)
    x = inputs(layer, 3)
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))
    assert twin.lora_A is not layer.lora_A


@pytest.mark.parametrize("mask", [False, True], ids=["resized", "masked"])
@pytest.mark.parametrize(("old", "new"), [(4, 2), (4, 4), (2, 2)])
def test_put_keeps_the_parameters_and_the_function(mask, old, new):
    layer = adapted(r=old)
    A, B = layer.lora_A, layer.lora_B
    keep = layer(inputs(layer, 3)).sum()  # a live graph, as a caller's last loss is
    g = torch.Generator().manual_seed(9)
    a, b = torch.randn(new, 7, generator=g, dtype=torch.float64), torch.randn(5, new, generator=g, dtype=torch.float64)
    layer.put(a, b, 0.3, mask=mask)
    x = inputs(layer, 3)
    layer(x).sum().backward()
    assert layer.lora_A is A
    assert layer.lora_B is B
    assert A.grad.shape == A.shape == ((old if mask else new), 7)
    expected = nn.functional.linear(x, layer.weight, layer.bias) + 0.3 * x @ a.t() @ b.t()
    assert torch.allclose(layer(x), expected, atol=1e-12)
    assert not A.grad[new:].any()
    assert not B.grad[:, new:].any()
    assert keep.isfinite()


def test_what_can_carry_a_link():
    assert is_linear(nn.Linear(2, 2))
    assert not is_linear(nn.Embedding(2, 2))
    assert refusal(nn.Linear(2, 2)) is None
    assert "already carries a link" in refusal(adapted())


def test_compiled_layer_agrees_with_eager():
    layer = adapted(16, 12, 3, dtype=torch.float32)
    compiled = torch.compile(lambda t: layer(t), backend="aot_eager", fullgraph=True)
    x = inputs(layer, 5, dtype=torch.float32)
    for a, b in zip(grads(compiled, layer, x), grads(layer, layer, x)):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
