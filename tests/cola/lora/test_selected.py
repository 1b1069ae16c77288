"""Links that keep indices instead of an A that selects inputs: against the same link with A in full."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cola import Chain, ChainOptimizer, KnotError, LinkConfig, NeverKnots, StepKnots
from cola.lora.selected import Selected

SELECTS = {"train": "B", "init": "selector"}


def columns(start):
    """The draw of ``init="selector"``, as a function, whose A is kept in full."""
    A = torch.zeros(start.rank, start.shape[1])
    for row in range(start.rank):
        A[row, (row + start.link * start.rank) % start.shape[1]] = 1
    return A


def made(init, make=lambda: nn.Linear(7, 5), dtype=torch.float64, **link):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(make(), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    config = LinkConfig(r=3, target_modules="all-linear", train="B", init=init, **link)
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=config, reset="transport", lr=0.05)
    return model, opt


def run(model, opt, steps=5, dtype=torch.float64):
    x = torch.randn(8, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    losses = []
    for _ in range(steps):
        loss = model(x).square().mean()
        losses.append(loss.item())
        loss.backward()
        opt.step()
        opt.zero_grad()
    return losses


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("make", [lambda: nn.Linear(7, 5), lambda: Conv1D(5, 7)], ids=["linear", "conv1d"])
def test_it_trains_the_same_chain_as_a_kept_A(make, dropout):
    found = []
    for init in ("selector", columns):
        torch.manual_seed(3)
        model, opt = made(init, make, lora_dropout=dropout)
        losses = run(model, opt)
        opt.finish()
        found.append((losses, [p.clone() for p in model.parameters()]))
    (losses, weights), (expected, others) = found
    # the sums of up to 7 products differ in their order, over 5 steps
    assert losses == pytest.approx(expected, rel=1e-12)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(weights, others))


def test_no_A_is_kept_and_the_model_is_plain_afterwards():
    model, opt = made("selector")
    keys = {name for name in model.state_dict() if name.startswith("0.")}
    assert keys == {"0.weight", "0.bias", "0.lora_columns", "0.lora_B"}
    assert isinstance(model[0], Selected)
    assert torch.equal(model[0].lora_A, torch.eye(7, dtype=torch.float64)[:3])
    opt.tie()
    assert model[0].lora_columns.tolist() == [3, 4, 5]
    opt.finish()
    assert type(model[0]) is nn.Linear
    assert [*model[0].state_dict()] == ["weight", "bias"]


@pytest.mark.parametrize(
    "link", [{"r": (3, 2)}, {"r": lambda link: 3}, {"train": "both"}, {"train": "A"}, {"init": "orthogonal"}]
)
def test_where_ranks_change_or_A_is_trained_it_is_kept(link):
    model = nn.Sequential(nn.Linear(7, 5))
    config = LinkConfig(**{"r": 3, "target_modules": "all-linear", **SELECTS, **link})
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=config, lr=0.1)
    assert isinstance(model[0].lora_A, nn.Parameter)
    opt.finish()


def test_the_fast_path_is_its_slow_twin_with_second_derivatives():
    model, _ = made("selector")
    layer = model[0]
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(2))
    x = torch.randn(2, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    assert torch.allclose(layer(x), layer.reference(x), rtol=0, atol=1e-14)
    torch.autograd.gradcheck(layer, (x,))
    torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_its_own_layer(copied):
    model, _ = made("selector")
    other = copied(model)
    assert isinstance(other[0], Selected)
    assert other[0].lora_columns is not model[0].lora_columns
    x = torch.ones(1, 7, dtype=torch.float64)
    assert torch.equal(other(x), model(x))


def test_a_run_is_saved_resumed_and_replayed_to_the_bit(tmp_path):
    model, opt = made("selector")
    run(model, opt, 3)
    opt.save(tmp_path / "checkpoint")
    rest = run(model, opt, 4)
    opt.finish()
    again, resumed = made("selector")
    resumed.load(tmp_path / "checkpoint")
    assert run(again, resumed, 4) == rest
    resumed.finish()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    opt.chain.save(tmp_path / "chain")
    replayed, bare = made("selector")
    bare.finish(merge=False)
    Chain.load(tmp_path / "chain").apply(replayed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), replayed.parameters()))


def test_a_state_dict_has_the_indices_and_a_later_knot_does_not_change_it():
    model, opt = made("selector")
    state = model.state_dict()
    opt.tie()
    assert state["0.lora_columns"].tolist() == [0, 1, 2]
    model.load_state_dict(state)
    assert model[0].lora_columns.tolist() == [0, 1, 2]
    del state["0.lora_columns"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0\.lora_columns\""):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == ["0.lora_columns"]
    assert not list(model.buffers())


def test_an_A_that_selects_nothing_is_refused():
    model, _ = made("selector")
    with pytest.raises(KnotError, match="this A selects no inputs"):
        model[0].put(torch.full((3, 7), 0.5), torch.zeros(5, 3), 1.0, mask=False)
