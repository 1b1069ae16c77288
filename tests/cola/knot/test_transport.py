"""Moments carried over a knot: exact where the directions stay, and projected where they do not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cola import ChainOptimizer, LinkConfig, NeverKnots
from cola.knot.transport import transport

# products of at most 12 terms in float64, through a pseudo-inverse whose condition is bounded by the draw
CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def made(base, train="B", init="orthogonal", r=2, scaling="constant", layer=nn.Linear, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(layer(8, 6, bias=False) if layer is nn.Linear else layer(8, 6)).double()
    alpha = r if isinstance(r, int) else 2
    link = LinkConfig(r=r, target_modules="all", train=train, init=init, lora_alpha=alpha, scaling=scaling)
    return model, ChainOptimizer(base, model, NeverKnots(), link=link, reset="transport", **kwargs)


def steps(model, opt, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(5, 8, generator=generator, dtype=torch.float64)
        x = x.argmax(1) if isinstance(model[0], nn.Embedding) else x
        (model(x) * torch.arange(6)).sum().backward()
        opt.step()
        opt.zero_grad()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_a_constant_gradients_momentum_is_its_projection(old_rank, new_rank, seed):
    """The momentum of B under the gradient G is c·G Aᵀ; afterwards it is c·G P A'ᵀ, P projecting on A's rows."""
    g = torch.Generator().manual_seed(seed)
    A, new_A = (torch.linalg.qr(torch.randn(7, r, generator=g).double()).Q.T for r in (old_rank, new_rank))
    G = torch.randn(4, 7, generator=g).double()
    B, new_B = nn.Parameter(torch.zeros(4, old_rank).double()), nn.Parameter(torch.zeros(4, new_rank).double())
    base = torch.optim.SGD([new_B], lr=0.1, momentum=0.9)
    base.state[new_B]["momentum_buffer"] = 3.0 * G @ A.T
    transport(base, {"x": (A, B)}, {"x": (nn.Parameter(new_A), new_B)})
    torch.testing.assert_close(base.state[new_B]["momentum_buffer"], 3.0 * G @ (A.T @ A) @ new_A.T, **CLOSE)


@pytest.mark.parametrize("train", ["A", "B"])
@pytest.mark.parametrize(("scaling", "ratio"), [("constant", 1), ("alpha/r", 2), ("rslora", 2**0.5)])
def test_a_constant_gradients_momentum_has_the_new_links_scale(train, scaling, ratio):
    """As above, in a run: three steps of momentum 0.9 hold (1 + 0.9 + 0.81)·s·G Aᵀ."""
    model, opt = made(torch.optim.SGD, train, r=(4, 2), scaling=scaling, lr=1e-3, momentum=0.9)
    G = torch.randn(6, 8).double()
    for _ in range(3):
        (model(torch.eye(8).double()) * G.T).sum().backward()
        opt.step()
        opt.zero_grad()
    layer = model[0]
    A, B, scale = layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), layer.scaling
    opt.tie()
    assert layer.scaling == pytest.approx(ratio * scale)
    if train == "B":
        parameter, expected = layer.lora_B, G @ torch.linalg.pinv(A) @ A @ layer.lora_A.T
    else:
        parameter, expected = layer.lora_A, layer.lora_B.T @ B @ torch.linalg.pinv(B) @ G
    momentum = opt.state[parameter]["momentum_buffer"]
    torch.testing.assert_close(momentum, 2.71 * layer.scaling * expected.detach(), **CLOSE)


def slowly(M, V, A, new_A, ratio, step):
    """The moments in the new directions, number by number; Adam's bias is 1 − βᵗ."""
    grown, squares_grown = 1 - 0.9**step, 1 - 0.999**step
    first, second = torch.zeros(len(M), len(new_A)).double(), torch.zeros(len(M), len(new_A)).double()
    mean_square = sum(float(a @ a) for a in A) / len(A)
    for j, direction in enumerate(ratio * new_A):
        coordinates = torch.linalg.lstsq(A.T, direction, driver="gelsd").solution
        rest = direction - A.T @ coordinates
        unknown = float(rest @ rest) / mean_square if mean_square else 0.0
        for i in range(len(M)):
            first[i, j] = sum(c * m for c, m in zip(coordinates, M[i]))
            mean_squares = [(v / squares_grown, (m / grown) ** 2) for m, v in zip(M[i], V[i])]
            variance = sum(c**2 * (v - m) for c, (v, m) in zip(coordinates, mean_squares))
            turned = abs(variance + (first[i, j] / grown) ** 2)
            second[i, j] = squares_grown * turned + unknown * sum(V[i]) / len(V[i])
    return first, second


@given(
    st.integers(1, 3), st.integers(1, 3), st.floats(0.25, 4), st.integers(0, 3), st.integers(1, 2000),
    st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_both_moments_are_those_of_the_slow_twin(old_rank, new_rank, ratio, zeros, step, seed):
    """The first rows of A may be zero, and with them the moments in these directions."""
    g = torch.Generator().manual_seed(seed)
    A, new_A = (torch.randn(r, 5, generator=g).double() for r in (old_rank, new_rank))
    M, V = torch.randn(4, old_rank, generator=g).double(), torch.rand(4, old_rank, generator=g).double()
    A[:zeros], M[:, :zeros], V[:, :zeros] = 0, 0, 0
    new_B = nn.Parameter(torch.zeros(4, new_rank).double())
    base = torch.optim.AdamW([new_B])
    base.state[new_B].update(exp_avg=M.clone(), exp_avg_sq=V.clone(), step=torch.tensor(float(step)))
    transport(base, {"x": (A, torch.zeros_like(M))}, {"x": (nn.Parameter(new_A), new_B)}, scales={"x": ratio})
    first, second = slowly(M, V, A, new_A, ratio, step)
    torch.testing.assert_close(base.state[new_B]["exp_avg"], first, **CLOSE)
    torch.testing.assert_close(base.state[new_B]["exp_avg_sq"], second, **CLOSE)


@pytest.mark.parametrize("step", [1, 20, 1000])
def test_a_constant_gradients_moments_are_those_of_a_run_in_the_new_directions(step):
    """Both A have orthonormal rows and span the same plane, so nothing is lost but to rounding."""
    g = torch.Generator().manual_seed(step)
    A = torch.linalg.qr(torch.randn(5, 2, generator=g).double())[0].T
    new_A = torch.linalg.qr(torch.randn(2, 2, generator=g).double())[0] @ A
    gradient, taken = torch.randn(4, 5, generator=g).double(), []
    for directions in (A, new_A):
        B = nn.Parameter(torch.zeros(4, 2).double())
        base = torch.optim.Adam([B])
        for _ in range(step):
            B.grad = gradient @ directions.T
            base.step()
        taken.append((base, B))
    (base, B), (expected, new_B) = taken
    base.param_groups[0]["params"] = [new_B]
    base.state[new_B] = base.state.pop(B)
    transport(base, {"x": (A, B.detach())}, {"x": (nn.Parameter(new_A), new_B)})
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(base.state[new_B][name], expected.state[new_B][name], rtol=1e-9, atol=1e-12)


def test_a_direction_that_the_old_ones_do_not_reach_has_the_rows_mean_second_moment():
    A, new_A = torch.eye(4)[:2].double(), torch.eye(4)[1:3].double()  # the first is an old one, the second is new
    B, new_B = torch.zeros(3, 2).double(), nn.Parameter(torch.zeros(3, 2).double())
    base = torch.optim.AdamW([new_B])
    first, second = torch.randn(3, 2).double(), torch.rand(3, 2).double()
    base.state[new_B].update(exp_avg=first.clone(), exp_avg_sq=second.clone())
    transport(base, {"x": (A, B)}, {"x": (nn.Parameter(new_A), new_B)})
    expected = torch.stack([second[:, 1], second.mean(1)], 1)
    torch.testing.assert_close(base.state[new_B]["exp_avg_sq"], expected, **CLOSE)
    torch.testing.assert_close(base.state[new_B]["exp_avg"], torch.stack([first[:, 1], torch.zeros(3)], 1), **CLOSE)


@pytest.mark.parametrize("train", ["A", "B"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_moments_stay_where_the_directions_do(train, amsgrad):
    model, opt = made(torch.optim.AdamW, train, lr=0.01, amsgrad=amsgrad)
    steps(model, opt, 3)
    (path, layer), *_ = opt.live.layers.items()
    parameter = layer.lora_B if train == "B" else layer.lora_A
    before = {name: value.clone() for name, value in opt.state[parameter].items()}
    pair = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    transport(opt.base, {path: pair}, {path: (layer.lora_A, layer.lora_B)})
    for name, value in opt.state[parameter].items():
        torch.testing.assert_close(value, before[name], **CLOSE)


def amsgrad(params, lr):
    return torch.optim.Adam(params, lr, amsgrad=True)


def fused(params, lr):
    return torch.optim.AdamW(params, lr, fused=True)


@pytest.mark.parametrize(
    "base",
    [
        torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, amsgrad, fused,
        lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9),
        *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else []),  # since torch 2.9
    ],
)  # fmt: skip
@pytest.mark.parametrize("layer", [nn.Linear, nn.Embedding])
@pytest.mark.parametrize("train", ["A", "B", "both"])
@pytest.mark.parametrize("r", [2, (3, 1)])
def test_a_run_goes_on_with_rotated_moments(base, layer, train, r):
    model, opt = made(base, train, r=r, layer=layer, lr=0.01)
    steps(model, opt, 4)
    opt.tie()
    ((path, layer),) = opt.live.layers.items()
    parameter, other = getattr(layer, opt.live.zero_first(path)), layer.lora_A
    other = layer.lora_B if parameter is other else other
    state = opt.state[parameter]
    assert state.get("step", 4) == 4
    for name in {"exp_avg", "momentum_buffer"} & {*state}:
        assert state[name].shape == parameter.shape
        assert state[name].any()
    for name in {"exp_avg_sq", "max_exp_avg_sq"} & {*state}:
        assert (state[name] >= 0).all()
        assert state[name].any()
    assert other not in opt.state or not opt.state[other]
    steps(model, opt, 3)
    opt.finish()
    assert len(opt.chain) == 2


def test_an_embedding_that_no_token_trained_goes_on():
    model, opt = made(torch.optim.AdamW, "both", layer=nn.Embedding, lr=0.01)
    (0.0 * model(torch.arange(3))).sum().backward()
    opt.step()
    opt.tie()
    steps(model, opt, 2)
    opt.finish()
    assert model[0].weight.isfinite().all()


class Outer(torch.optim.SGD):
    """An optimizer around one that keeps the state."""

    def __init__(self, params):
        params = list(params)
        super().__init__(params)
        self.inner = torch.optim.Adam(params)

    def step(self):
        self.inner.step()


class Several(Outer):
    """The same, in a list."""

    def __init__(self, params):
        super().__init__(params)
        self.inner = [self.inner]

    def step(self):
        self.inner[0].step()


class ById(torch.optim.SGD):
    """State in a dict by the parameter's id."""

    def __init__(self, params):
        super().__init__(params)
        self.slow = {}

    def step(self):
        for p in self.param_groups[0]["params"]:
            self.slow[id(p)] = p.detach().clone()


class Late(torch.optim.AdamW):
    """State that the second step adds."""

    def step(self):
        super().step()
        for p in self.param_groups[0]["params"]:
            if self.state[p]["step"] > 1:
                self.state[p]["slow"] = p.detach().clone()


class Nested(torch.optim.SGD):
    """State in a dict, under a known name."""

    def step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["exp_avg"] = {"rows": p.sum(0)}


@pytest.mark.parametrize(
    ("base", "told"),
    [
        (torch.optim.Adagrad, "'sum'"), (torch.optim.RMSprop, "'square_avg'"), (torch.optim.Rprop, "'prev'"),
        (torch.optim.Adamax, "'exp_inf'"), (torch.optim.ASGD, "'ax'"), (torch.optim.Adafactor, "'col_var'"),
        ("transformers.optimization.Adafactor", "'exp_avg_sq_col'"), ("prodigyopt.Prodigy", "'p0'"),
        (Outer, "'inner'"), (Several, "'inner'"), (ById, "'slow'"), (Late, "'slow'"),
        (Nested, "'exp_avg'"), (torch.optim.LBFGS, "the state of LBFGS, which raises .*closure"),
        ("schedulefree.AdamWScheduleFree", "the state of .*, which raises .* not in train mode"),
    ],
)  # fmt: skip
def test_a_base_whose_state_the_rule_does_not_know_is_refused_before_anything_changes(base, told):
    if isinstance(base, str):
        module, _, name = base.rpartition(".")
        base = getattr(pytest.importorskip(module), name)
    model = nn.Sequential(nn.Linear(8, 6))
    link = LinkConfig(r=2, target_modules="all-linear")
    told = f"reset='transport' cannot rotate {told}.*: use .* Muon or SGD, or reset='state'"
    with pytest.raises(ValueError, match=told):
        ChainOptimizer(base, model, NeverKnots(), link=link, reset="transport")
    assert type(model[0]) is nn.Linear


def test_a_run_with_rotated_moments_is_resumed_bit_for_bit(tmp_path):
    whole, opt = made(torch.optim.AdamW, lr=0.01)
    steps(whole, opt, 3)
    opt.save(tmp_path)
    resumed, again = made(torch.optim.AdamW, lr=0.01)
    again.load(tmp_path)
    for model, one in ((whole, opt), (resumed, again)):
        one.tie()
        steps(model, one, 2, seed=1)
        one.finish()
    assert torch.equal(whole[0].weight, resumed[0].weight)
