"""An adapted layer's output is an ordinary tensor: whatever may be done to a plain layer's may be done to it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cola import ChainOptimizer, LinkConfig, NeverKnots
from tests.cola.lora.test_layer import adapted


def assign(y):
    y[..., :2] = 0.5
    return y


def add_through_a_view(y):
    y.view(-1)[:3].add_(1.0)
    return y


def scale_through_a_transpose(y):
    y.transpose(0, -1).mul_(0.5)
    return y


def narrow_then_relu(y):
    y.narrow(-1, 0, 3).relu_()
    return y


def retain(y):
    y.retain_grad()
    y.register_hook(lambda grad: grad * 2)
    return y.square()


def add_to_a_flat_copy(y):
    flat = y.flatten().add_(1.0)
    return flat.view(y.shape)


OPERATIONS = {
    "relu_": lambda y: y.relu_(),
    "F.relu(inplace)": lambda y: F.relu(y, inplace=True),
    "add_": lambda y: y.add_(0.3),
    "mul_ by itself": lambda y: y.mul_(y.detach().clone()),
    "masked_fill_": lambda y: y.masked_fill_(y > 1, 0.0),
    "unsqueeze_": lambda y: y.unsqueeze_(0),
    "assign": assign,
    "view": add_through_a_view,
    "transpose": scale_through_a_transpose,
    "narrow": narrow_then_relu,
    "flatten": add_to_a_flat_copy,
    "hooks": retain,
    "in-place twice": lambda y: y.add_(1.0).sigmoid_(),
    "checkpoint": lambda y: checkpoint(lambda z: z.square().add_(1.0), y, use_reentrant=False),
}
LAYERS = {
    "with bias": {},
    "without bias": {"bias": False},
    "Conv1D": {"conv1d": True},
    "dropout": {"dropout": 0.25},
}


@pytest.mark.parametrize("lead", [(4,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_on_the_output(operation, kind, lead):
    layer, x = adapted(**LAYERS[kind]), torch.randn(*lead, 7, dtype=torch.float64)
    results = []
    for way in (layer, layer.reference):
        torch.manual_seed(3)  # of the dropout, whose mask differs between the two ways
        mine = x.clone().requires_grad_()
        out = OPERATIONS[operation](way(mine))
        wanted = [mine, layer.lora_A, layer.lora_B]
        results.append([out.detach(), *torch.autograd.grad(out.sum(), wanted)])
    if kind != "dropout":
        for fast, slow in zip(*results):
            torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["with bias", "without bias", "Conv1D"])
def test_second_derivatives_through_an_operation_in_place(kind):
    layer = adapted(**LAYERS[kind])
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x).mul_(0.5).tanh_(), (x,))


def chained(*after):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), *after, nn.Linear(8, 8))
    link = LinkConfig(r=2, target_modules="all-linear")
    return model, ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=link, lr=0.1)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("after", [nn.ReLU, nn.Hardswish, nn.ELU, nn.Dropout], ids=lambda kind: kind.__name__)
def test_modules_that_work_in_place(after, compiled):
    losses = []
    for inplace in (False, True):
        model, opt = chained(after(inplace=inplace).eval())
        called = torch.compile(model, backend="aot_eager") if compiled else model
        x = torch.linspace(-1, 1, 64).view(2, 4, 8)
        for _ in range(2):
            loss = called(x).square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_hooks_on_the_module():
    """`nn.Module`'s hooks see what they see of a plain layer, and may replace or change the output in place."""
    model, opt = chained(nn.Identity())
    seen = []
    handles = [
        model[0].register_forward_hook(lambda module, args, out: out.add_(1.0)),
        model[0].register_full_backward_hook(lambda module, into, out: seen.append((into[0].shape, out[0].shape))),
        model[0].register_full_backward_pre_hook(lambda module, out: (out[0] * 2,)),
        model[2].register_forward_hook(lambda module, args, out: out.view(-1, 8)),
    ]
    x = torch.randn(2, 4, 8, requires_grad=True)
    out = model(x)
    assert out.shape == (8, 8)
    out.sum().backward()
    assert seen == [((2, 4, 8), (2, 4, 8))]
    for handle in handles:
        handle.remove()
    opt.finish()


def test_a_forward_that_a_hook_has_kept_serves_after_the_chain():
    """Dispatch hooks keep the bound forward that they found; after `finish` it is the plain layer's."""
    model, opt = chained(nn.Identity())
    kept = model[0].forward
    model[0].forward = lambda x: kept(x)
    x = torch.randn(3, 8)
    model(x).sum().backward()
    opt.step()
    opt.finish()
    expected = F.linear(x, model[0].weight, model[0].bias)
    assert torch.equal(model[0](x), expected)
