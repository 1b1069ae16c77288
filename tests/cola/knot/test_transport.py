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


def made(base, train="B", init="orthogonal", r=2, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    link = LinkConfig(
        r=r, target_modules="all-linear", train=train, init=init, lora_alpha=r if isinstance(r, int) else 2
    )
    return model, ChainOptimizer(base, model, NeverKnots(), link=link, reset="transport", **kwargs)


def steps(model, opt, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(5, 8, generator=generator, dtype=torch.float64)
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


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam])
@pytest.mark.parametrize("train", ["A", "B", "both"])
@pytest.mark.parametrize("r", [2, (3, 1)])
def test_a_run_goes_on_with_rotated_moments(base, train, r):
    model, opt = made(base, train, r=r, lr=0.01)
    steps(model, opt, 4)
    opt.tie()
    ((_, layer),) = opt.live.layers.items()
    parameter, other = (layer.lora_A, layer.lora_B) if train == "A" else (layer.lora_B, layer.lora_A)
    state = opt.state[parameter]
    assert state["step"] == 4
    assert state["exp_avg"].shape == parameter.shape
    assert state["exp_avg"].any()
    assert (state["exp_avg_sq"] >= 0).all()
    assert other not in opt.state or not opt.state[other]
    steps(model, opt, 3)
    opt.finish()
    assert len(opt.chain) == 2


@pytest.mark.parametrize(
    ("base", "what"),
    [
        (torch.optim.Adagrad, "sum"), (torch.optim.RMSprop, "square_avg"), (torch.optim.Rprop, "prev"),
        (torch.optim.Adamax, "exp_inf"), (torch.optim.ASGD, "ax"), (torch.optim.LBFGS, "state of a closure"),
    ],
)  # fmt: skip
def test_a_base_whose_state_the_rule_does_not_know_is_refused_before_anything_changes(base, what):
    model = nn.Sequential(nn.Linear(8, 6))
    link = LinkConfig(r=2, target_modules="all-linear")
    with pytest.raises(ValueError, match=f"reset='transport' cannot rotate '{what}' of {base.__name__}"):
        ChainOptimizer(base, model, NeverKnots(), link=link, reset="transport", lr=0.01)
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
