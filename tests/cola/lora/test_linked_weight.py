"""A `LinkedWeight` computes what its slow twin, the sum ``W + s·L R``, does: outputs, first and second derivatives."""

import copy

import pytest
import torch
from torch import nn
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

from cola import ChainOptimizer, LinkConfig, NeverKnots
from cola.lora import linked_weight
from cola.lora.linked_weight import RULES, LinkedWeight, linked
from tests.kinds import KINDS

pytestmark = pytest.mark.numerics

S, R = 1.5, 2
ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)
IDS = torch.tensor([[0, 3, 3], [2, 1, 0]])

#: an operation by name: (of x and the weight, shape of x, shape of the weight); those without x take a number
OPERATIONS = {
    "linear": (F.linear, (5, 6), (4, 6)),
    "linear of one row": (F.linear, (6,), (4, 6)),
    "linear with bias": (lambda x, w: F.linear(x, w, torch.arange(4.0, dtype=x.dtype)), (2, 5, 6), (4, 6)),
    "x @ w.T": (lambda x, w: x @ w.T, (5, 6), (4, 6)),
    "x @ w.mT": (lambda x, w: x @ w.mT, (3, 5, 6), (3, 4, 6)),
    "w @ x": (lambda x, w: w @ x, (6, 5), (4, 6)),
    "w @ one column": (lambda x, w: w @ x, (6,), (4, 6)),
    "one row @ w": (lambda x, w: x @ w, (4,), (4, 6)),
    "matmul": (torch.matmul, (5, 4), (4, 6)),
    "matmul from the right": (lambda x, w: torch.matmul(w, x), (6, 5), (4, 6)),
    "x.matmul(w)": (lambda x, w: x.matmul(w), (2, 5, 4), (4, 6)),
    "mm": (lambda x, w: torch.mm(x, w.t()), (5, 6), (4, 6)),
    "x.mm": (lambda x, w: x.mm(torch.t(w)), (5, 6), (4, 6)),
    "bmm": (torch.bmm, (3, 5, 4), (3, 4, 6)),
    "bmm, transposed": (lambda x, w: x.bmm(w.transpose(1, 2)), (3, 5, 6), (3, 4, 6)),
    "bmm from the left": (lambda x, w: torch.bmm(w, x), (3, 6, 5), (3, 4, 6)),
    "stack @ x": (lambda x, w: w @ x, (3, 6, 5), (3, 4, 6)),
    "one for all @ stack": (lambda x, w: x @ w, (5, 4), (3, 4, 6)),
    "expert by number": (lambda x, w: F.linear(x, w[1]), (5, 6), (3, 4, 6)),
    "last expert": (lambda x, w: F.linear(x, w[-1]), (5, 6), (3, 4, 6)),
    "expert by tensor": (lambda x, w: x @ w[torch.tensor(2)].transpose(0, 1), (5, 6), (3, 4, 6)),
    "experts gathered": (lambda x, w: torch.bmm(w[torch.tensor([2, 0, 2, 1])], x), (4, 6, 5), (3, 4, 6)),
    "experts unbound": (lambda x, w: torch.stack([x @ one.mT for one in w.unbind()]), (5, 6), (3, 4, 6)),
    "experts in a loop": (lambda x, w: sum(F.linear(x, one) for one in w), (5, 6), (3, 4, 6)),
    "grouped": (lambda x, w: F.grouped_mm(x, w, offs=ENDS), (5, 4), (3, 4, 8)),
    "grouped, transposed": (lambda x, w: F.grouped_mm(x, w.transpose(-2, -1), offs=ENDS), (5, 8), (3, 4, 8)),
    "another grouped": (lambda x, w: torch._grouped_mm(x, w, offs=ENDS), (5, 4), (3, 4, 8)),
    "look-up": (lambda x, w: x * F.embedding(IDS, w), (6,), (4, 6)),
    "look-up with padding": (lambda x, w: x * F.embedding(IDS, w, 3), (6,), (4, 6)),
    "rows": (lambda x, w: x * w[IDS], (6,), (4, 6)),
    "one row": (lambda x, w: x * w[1], (6,), (4, 6)),
    "conv1d": (lambda x, w: F.conv1d(x, w, padding="same"), (2, 3, 7), (4, 3, 3)),
    "conv1d in groups": (lambda x, w: F.conv1d(x, w, stride=2, groups=2), (2, 6, 7), (4, 3, 2)),
    "conv2d": (lambda x, w: F.conv2d(x, w, torch.ones(4, dtype=x.dtype), 2, 1), (2, 3, 6, 5), (4, 3, 3, 2)),
    "conv2d in groups": (lambda x, w: F.conv2d(x, w, dilation=2, groups=3), (2, 9, 7, 7), (6, 3, 3, 3)),
    "conv2d without a batch": (F.conv2d, (3, 6, 5), (4, 3, 3, 2)),
    "conv3d": (F.conv3d, (1, 2, 4, 4, 3), (4, 2, 2, 2, 2)),
}
#: operations that no rule follows: the sum is formed, with a warning
OTHERS = {
    "einsum": (lambda x, w: torch.einsum("bi,oi->bo", x, w), (5, 6), (4, 6)),
    "times": (lambda x, w: x * w, (6,), (4, 6)),
    "slice": (lambda x, w: F.linear(x, w[1:3]), (5, 6), (4, 6)),
    "mask": (lambda x, w: x * w[torch.tensor([True, False, True, False])], (6,), (4, 6)),
    "cat": (lambda x, w: x @ torch.cat([w, w]).T, (5, 6), (4, 6)),
    "addmm": (lambda x, w: torch.addmm(x, x, w), (6, 6), (6, 6)),
    "two weights": (lambda x, w: x @ (w.T @ w), (5, 6), (4, 6)),
    "conv_transpose2d": (F.conv_transpose2d, (2, 4, 5, 5), (4, 3, 2, 2)),
    "bilinear": (lambda x, w: F.bilinear(x, x, w), (5, 6), (4, 6, 6)),
    # a convolution's W has three dimensions, and its factors have two
    "kernels": (lambda x, w: F.conv1d(x, w[torch.tensor([1, 0])]), (2, 3, 7), (4, 3, 3)),
    "one kernel": (lambda x, w: F.conv1d(x, w[1][None]), (2, 3, 7), (4, 3, 3)),
    "kernels in a loop": (lambda x, w: F.conv1d(x, torch.stack(list(w))), (2, 3, 7), (4, 3, 3)),
    "x @ kernels": (lambda x, w: x @ w, (5, 3), (4, 3, 3)),
}
SINGLE = ("grouped", "grouped, transposed", "another grouped")  # torch has no kernel in fp64


def draws(shape, x_shape, dtype=torch.float64):
    """x, W, L and R; a weight of three dimensions stacks three matrices, or is a convolution's of other lengths."""
    g = torch.Generator().manual_seed(0)
    if len(shape) == 3 and shape[0] == 3:
        left, right = (3, shape[1], R), (3, R, shape[2])
    else:
        left, right = (shape[0], R), (R, torch.Size(shape[1:]).numel())
    x, W, left, right = (
        torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for size in (x_shape, shape, left, right)
    )
    return x, W, left, right


@pytest.fixture
def never_summed(monkeypatch):
    def refuse(weight):
        raise AssertionError("the sum was formed")

    monkeypatch.setattr(LinkedWeight, "summed", refuse)


def at(name, table=OPERATIONS, dtype=torch.float64):
    """The operation on (x, W, L, R) with a linked weight and with the sum, and the values."""
    operation, x_shape, shape = table[name]
    values = draws(shape, x_shape, torch.float32 if name in SINGLE else dtype)
    if name == "look-up with padding":
        values[2][3] = 0  # as its A begins; the row has no gradient, so it stays

    def fast(x, W, left, right):
        return operation(x, linked(W, left, right, S))

    def slow(x, W, left, right):
        return operation(x, W + S * (left @ right).reshape(W.shape))

    return fast, slow, values


def close(found, expected):
    """As sums of a few dozen terms, taken in another order."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2**8 * torch.finfo(expected[0].dtype).eps)


@pytest.mark.parametrize("name", OPERATIONS)
def test_outputs_and_gradients_are_those_of_the_sum_which_is_not_formed(name, never_summed):
    fast, slow, values = at(name)
    values = [value.requires_grad_(i != 1) for i, value in enumerate(values)]
    trained = [values[0], values[2], values[3]]
    expected = slow(*values)
    found = fast(*values)
    assert type(found) is torch.Tensor
    upstream = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    close(found, expected)
    close(torch.autograd.grad(found, trained, upstream), torch.autograd.grad(expected, trained, upstream))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in SINGLE])
def test_second_derivatives_are_those_of_the_sum(name):
    fast, slow, values = at(name)
    values = [value.requires_grad_(i != 1) for i, value in enumerate(values)]
    trained, second = [values[0], values[2], values[3]], []
    for way in (fast, slow):
        first = torch.autograd.grad(way(*values).square().sum(), trained, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), trained))
    for found, expected in zip(*second):  # relative: squares of squares of sums
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


#: autograd's functions look at W, L and R one by one
TRANSFORMS = {
    "grad": lambda f, v: grad(lambda *v: f(*v).square().sum(), (0, 1, 2, 3))(*v),
    "vmap": lambda f, v: vmap(f, (0, None, None, None))(torch.stack([v[0], 2 * v[0]]), *v[1:]),
    "vmap of links": lambda f, v: vmap(f, (None, None, 0, 0))(*v[:2], *(torch.stack([t, 2 * t]) for t in v[2:])),
    "vmap of grad": lambda f, v: vmap(grad(lambda *v: f(*v).square().sum(), (2, 3)), (0, None, None, None))(
        torch.stack([v[0], 2 * v[0]]), *v[1:]
    ),
    "jvp": lambda f, v: jvp(f, tuple(v), tuple(v)),
    "vjp": lambda f, v: vjp(f, *v)[1](torch.ones_like(f(*v))),
    "jacrev": lambda f, v: jacrev(f, 2)(*v),
    "jacfwd": lambda f, v: jacfwd(f, 2)(*v),
}
#: one of each rule; looking up rows of several matrices has no rule in vmap
TRANSFORMED = (
    "linear",
    "x @ w.T",
    "bmm",
    "expert by number",
    "experts gathered",
    "look-up",
    "rows",
    "conv2d in groups",
)


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func_give_those_of_the_sum(transform, name):
    fast, slow, values = at(name)
    found, expected = (TRANSFORMS[transform](way, values) for way in (fast, slow))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OTHERS)
def test_where_no_rule_follows_the_sum_is_formed_and_said_once(name, caplog):
    linked_weight._tell.cache_clear()
    fast, slow, values = at(name, OTHERS)
    values = [value.requires_grad_(i != 1) for i, value in enumerate(values)]
    trained, expected = [values[0], values[2], values[3]], slow(*values)
    for _ in range(2):
        found = fast(*values)
        torch.testing.assert_close(found, expected)
    close(torch.autograd.grad(found.sum(), trained), torch.autograd.grad(expected.sum(), trained))
    (told,) = (r.getMessage() for r in caplog.records if "which a link cannot follow" in r.getMessage())
    assert told.startswith("a weight is read by")


def test_every_rule_has_an_operation_above():
    used = set()

    class Noted(dict):
        def get(self, key, default=None):
            used.add(key)
            return super().get(key, default)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linked_weight, "RULES", Noted(RULES))
        for name in OPERATIONS:
            fast, _, values = at(name)
            fast(*values)
    rare = {torch.bmm, torch.unbind, torch.transpose, torch.Tensor.matmul}  # twins of those used
    shown = {torch.Tensor.to, torch.Tensor.detach, torch.Tensor.data.__get__, torch.Tensor.requires_grad_}  # below
    assert set(RULES) - used <= rare | shown, {getattr(f, "__name__", f) for f in set(RULES) - used}


def weight(dtype=torch.float64, **options):
    _, W, left, right = draws((4, 6), (5, 6), dtype)
    return linked(W, left.requires_grad_(), right.requires_grad_(), S, title="W", **options)


def test_it_looks_like_the_weight():
    w = weight(torch.float32)
    assert (w.shape, w.dtype, w.device, w.dim(), w.numel(), w.size(1), len(w)) == (
        (4, 6),
        torch.float32,
        w.plain.device,
        2,
        24,
        6,
        4,
    )
    assert w.stride() == w.plain.stride()
    assert w.is_contiguous()
    assert w.is_floating_point()
    assert repr(w) == repr(w.summed())
    assert w.tolist() == w.summed().tolist()
    cast = w.to(torch.float64)
    assert (cast.dtype, cast.plain.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(
        F.linear(torch.eye(6, dtype=torch.float64), cast).T, w.summed().double(), rtol=0, atol=1e-6
    )
    assert not w.detach().left.requires_grad
    w.requires_grad_()
    assert w.plain.requires_grad
    w.requires_grad = False
    assert not w.plain.requires_grad
    w.data = w.data.to(torch.float64)
    assert w.plain.dtype == torch.float64


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2), lambda w: w.data.clamp_(0, 1), lambda w: nn.init.normal_(w), lambda w: w.__setitem__(0, 1),
        lambda w: w.__iadd__(1), lambda w: torch._foreach_mul_([w], 2), lambda w: w.copy_(w), lambda w: F.relu_(w),
        lambda w: setattr(w, "data", torch.zeros(6, 6)),
    ],
    ids=["mul_", "data", "init", "item", "+=", "foreach", "copy_", "relu_", "other data"],
)  # fmt: skip
def test_a_change_in_place_would_be_lost_and_is_refused(change):
    w = weight()
    before = w.summed()
    with pytest.raises(RuntimeError, match=r"^W is changed by .* while it carries a link.*exclude_modules"):
        change(w)
    assert torch.equal(w.summed(), before)
    assert torch.zeros(4, 6, dtype=w.dtype).add_(w).equal(before)  # reading is no change


class Own(torch.autograd.Function):
    """A custom function of a weight, with the backward that every such kernel has."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


@pytest.mark.parametrize("wants_x", [True, False])
def test_a_custom_function_sees_a_weight_and_its_gradient_reaches_the_factors(wants_x):
    x, W, left, right = (value.requires_grad_(i > 1) for i, value in enumerate(draws((4, 6), (5, 6))))
    x.requires_grad_(wants_x)
    trained = [x] * wants_x + [left, right]
    found, expected = Own.apply(x, linked(W, left, right, S)), F.linear(x, W + S * left @ right)
    close(found, expected)
    close(torch.autograd.grad(found.sum(), trained), torch.autograd.grad(expected.sum(), trained))


def test_a_kernel_that_goes_past_python_is_refused():
    with torch.library._scoped_library("cola_test", "DEF") as library:
        library.define("past(Tensor x, Tensor w) -> Tensor")
        library.impl("past", lambda x, w: x @ w.t(), "CPU")
        x, w = torch.ones(2, 6, dtype=torch.float64), weight()
        said = r"^W is read by a custom function .*cola_test.past.*exclude_modules"
        with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match=said):
            torch.ops.cola_test.past(x, w)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in SINGLE])
def test_under_autocast_it_computes_in_bf16_as_the_sum_does(name):
    fast, slow, values = at(name, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fast(*values), slow(*values)
    assert found.dtype == expected.dtype
    # bf16 rounds the weight, x A and the output: a few units of the largest sums
    scale = expected.float().abs().max()
    assert (found.float() - expected.float()).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps * scale


@pytest.mark.parametrize(
    "name", ["linear", "x @ w.T", "w @ x", "experts gathered", "grouped", "conv2d", "conv1d in groups"]
)
def test_dropout_drops_inputs_of_the_link_alone_and_keeps_the_mean(name):
    operation, x_shape, shape = OPERATIONS[name]
    x, W, left, right = draws(shape, x_shape, torch.float32)
    zero = linked(W, torch.zeros_like(left), right, S, 0.5)
    torch.testing.assert_close(operation(x, zero), operation(x, W))
    dropped = linked(W, left, right, S, 0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outs = torch.stack([operation(x, dropped) for _ in range(100)])
    expected = operation(x, linked(W, left, right, S))
    error = (outs.mean(0) - expected).abs() / (outs.std(0) / 10 + 1e-6)
    assert outs.std(0).max() > 0
    assert error.max() < 5  # standard errors, of which some hundred are looked at


def test_experts_taken_without_a_graph_do_not_take_it_from_the_rest():
    """Matrices of a stack are kept: those of a look under no_grad have no gradient."""
    x, W, left, right = (value.requires_grad_(i > 1) for i, value in enumerate(draws((3, 4, 6), (5, 6))))
    w = linked(W, left, right, S)
    with torch.no_grad():
        F.linear(x, w[0])
    F.linear(x, w[0]).sum().backward()
    assert left.grad[0].any()
    assert not left.grad[1:].any()
    assert right.grad[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_each_kind_give_gradients_under_checkpointing(kind):
    """Activation checkpointing runs the forward again, within the backward."""
    from torch.utils.checkpoint import checkpoint

    made = KINDS[kind]
    dtype = torch.float32 if "grouped" in kind else torch.float64
    model, x = made.model(dtype), made.inputs(dtype=dtype)
    opt = ChainOptimizer(
        torch.optim.SGD, model, NeverKnots(), link=LinkConfig(r=2, target_modules="all", init="two-sided")
    )
    ways = [False] if made.looks_up else [False, True]  # the reentrant way wants inputs with gradients
    found = []
    for run in (model, *(lambda x, way=way: checkpoint(model, x, use_reentrant=way) for way in ways)):
        opt.zero_grad()
        run(copy.deepcopy(x) if made.looks_up else x.clone().requires_grad_()).square().sum().backward()
        found.append([p.grad.clone() for p in opt.live.adapters()])
    for again in found[1:]:
        torch.testing.assert_close(again, found[0])
