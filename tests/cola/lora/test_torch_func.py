"""`torch.func` and forward-mode AD over a model with a live link: as over any model."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from cola import ChainOptimizer, LinkConfig, NeverKnots
from cola.lora.layer import LoRALinear
from tests.models import BODY, Net, batch, train

X = batch(0, dtype=torch.float64)[0]


class Conv(Net):
    """The same with GPT-2's layer, whose weight is in×out."""

    def __init__(self, dtype=torch.float64):
        super().__init__(dtype=dtype)
        Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
        for name in BODY:
            plain = getattr(self, name)
            layer = Conv1D(plain.out_features, plain.in_features).to(dtype)
            layer.weight = nn.Parameter(plain.weight.detach().t().clone())
            setattr(self, name, layer)


MODELS = {"linear": lambda: Net(dtype=torch.float64), "conv1d": Conv}


@pytest.fixture(params=MODELS)
def chained(request):
    """A model whose link is not zero, and its optimizer."""
    model = MODELS[request.param]()
    link = LinkConfig(r=2, target_modules=BODY)
    opt = ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=link, lr=0.1)
    train(opt, model, 3, dtype=torch.float64)
    opt.zero_grad()
    return model, opt


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_at(model):
    return lambda parameters, x=X: functional_call(model, parameters, (x,)).square().sum()


def ones(values):
    return {name: torch.ones_like(value) for name, value in values.items()}


def dual(model):
    with forward_ad.dual_level():
        return model(forward_ad.make_dual(X, torch.ones_like(X)))


TRANSFORMS = {
    "vmap": lambda m: vmap(m)(X),
    "vmap of links": lambda m: vmap(loss_at(m))({name: torch.stack([p, 2 * p]) for name, p in trained(m).items()}),
    "grad by links": lambda m: grad(loss_at(m))(trained(m)),
    "grad by the input": lambda m: grad(lambda x: m(x).sum())(X),
    "grad by all": lambda m: grad(loss_at(m))(dict(m.named_parameters())),
    "vmap of grad by links": lambda m: vmap(grad(loss_at(m)), (None, 0))(trained(m), X),
    "vjp": lambda m: vjp(m, X)[1](torch.ones_like(m(X)))[0],
    "jacrev": lambda m: jacrev(m)(X),
    "jvp": lambda m: jvp(m, (X,), (X,)),
    "jvp by all": lambda m: jvp(loss_at(m), (dict(m.named_parameters()),), (ones(dict(m.named_parameters())),)),
    "jacfwd": lambda m: jacfwd(m)(X),
    "linearize": lambda m: linearize(m, X)[1](X),
    "dual numbers": dual,
    "jacobian, forward mode": lambda m: torch.autograd.functional.jacobian(
        m, X, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_takes_the_layers_slow_twin(chained, name, monkeypatch):
    model, opt = chained
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = TRANSFORMS[name](model)
    with monkeypatch.context() as patch:
        patch.setattr(LoRALinear, "forward", LoRALinear.reference)
        expected = TRANSFORMS[name](model)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    train(opt, model, 1, dtype=torch.float64)


@pytest.mark.parametrize("name", ["vmap", "grad by the input", "vjp", "jacrev", "jvp", "jacfwd", "linearize"])
def test_what_is_taken_by_the_input_is_that_of_the_tied_model(chained, name):
    """In fp64; a tie rounds W + sBA once."""
    model, opt = chained
    found = TRANSFORMS[name](model)
    opt.finish()
    torch.testing.assert_close(found, TRANSFORMS[name](model))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_after_finish_every_transform_works(chained, name):
    model, opt = chained
    opt.finish()
    TRANSFORMS[name](model.requires_grad_())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_with_pefts_layers_every_transform_works(name):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Net(dtype=torch.float64), peft.LoraConfig(r=2, target_modules=BODY))
    opt = ChainOptimizer(torch.optim.SGD, model, NeverKnots(), lr=0.1)
    train(opt, model, 3, dtype=torch.float64)
    TRANSFORMS[name](model)


def test_reverse_mode_is_exact(chained):
    """Against ordinary autograd in fp64; the layer's twin of ordinary operations takes part, hence not bit for bit."""
    model, _ = chained
    every, loss = dict(model.named_parameters()), loss_at(model)
    links = trained(model)
    expected = dict(zip(links, torch.autograd.grad(loss(links), list(links.values()))))
    by = {
        "grad": grad(loss)(every),
        "jacrev": jacrev(loss)(every),
        "vjp": vjp(loss, every)[1](torch.ones((), dtype=torch.float64))[0],
        "vmap": {name: g.sum(0) for name, g in vmap(grad(loss), (None, 0))(every, X).items()},
        "by links": grad(loss)(links),
    }
    for found in by.values():
        torch.testing.assert_close({name: found[name] for name in links}, expected)
    second = hessian(loss)(every)
    name = "first.lora_B"
    direction = torch.randn(links[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad(loss(links), links[name], create_graph=True)
    (product,) = torch.autograd.grad(slope, links[name], direction)
    torch.testing.assert_close(torch.tensordot(second[name][name], direction, 2), product)


def test_batched_and_second_derivatives_of_ordinary_autograd_work(chained):
    model, _ = chained
    out, links = model(X), list(trained(model).values())
    rows = torch.eye(out.numel(), dtype=torch.float64).view(-1, *out.shape)
    at_once = torch.autograd.grad(out, links, rows, retain_graph=True, is_grads_batched=True)
    one_by_one = zip(*(torch.autograd.grad(out, links, row, retain_graph=True) for row in rows))
    for batched, single in zip(at_once, one_by_one):
        torch.testing.assert_close(batched, torch.stack(single))
    loops = torch.autograd.functional.jacobian(model, X)
    torch.testing.assert_close(torch.autograd.functional.jacobian(model, X, vectorize=True), loops)
