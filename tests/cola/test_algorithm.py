"""ChainOptimizer is Algorithm 1: it follows the float64 twin step by step, and without knots it is its base."""

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, EvenKnots, LinkConfig, NeverKnots, StepKnots
from tests import reference
from tests.models import BODY, Net, batch, draw, loss_of, train

pytestmark = pytest.mark.numerics

BASES = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}, lambda: reference.AdamW(0.02, weight_decay=0.1)),
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}, lambda: reference.Momentum(0.05, 0.9)),
    "Adagrad": (
        torch.optim.Adagrad,
        {"lr": 0.1, "initial_accumulator_value": 0.2},
        lambda: reference.Adagrad(0.1, 0.2),
    ),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(
    "link", [LinkConfig(r=2), LinkConfig(r=(3, 2, 1), scaling="alpha/r"), LinkConfig(r=2, init="kaiming")]
)
def test_the_optimizer_follows_the_twin(name, link):
    base, kwargs, twin_base = BASES[name]
    link = LinkConfig(**{**vars(link), "target_modules": BODY})
    model, seed, steps, knots = Net(dtype=torch.float64), 11, 14, [4, 9]
    weights = {n: getattr(model, n).weight.detach().clone() for n in BODY}

    def twin_loss(w, step):
        x, y = batch(step, dtype=torch.float64)
        h = torch.tanh(x @ w["first"].T + model.first.bias.detach())
        return (
            ((torch.tanh(h @ w["second"].T) @ model.head.weight.detach().T + model.head.bias.detach()) - y)
            .square()
            .mean()
        )

    run = reference.chain_of_lora(
        weights, BODY, twin_loss, steps, knots,
        draw=lambda n, i: draw(link, (6, 6), seed=seed, link=i, layer=n), scaling=link.scaling_of, base=twin_base,
    )  # fmt: skip
    opt = ChainOptimizer(base, model, StepKnots(at=knots), link=link, seed=seed, **kwargs)
    for step, twin_weights, factors in run:
        train(opt, model, 1, start=step - 1, dtype=torch.float64)
        for n in BODY:
            layer = getattr(model, n)
            # the same real-number recursion: float64 rounding, amplified over 14 steps by less than 1e4
            tight = {"rtol": 1e-11, "atol": 1e-12}
            assert torch.allclose(layer.weight, twin_weights[n], **tight), (step, n)
            assert torch.allclose(layer.lora_A, factors[n][0], **tight), (step, n)
            assert torch.allclose(layer.lora_B, factors[n][1], **tight), (step, n)
    assert len(opt.chain) == 2
    opt.finish()
    assert [link_.rank for link_ in opt.chain] == [link.rank_of(i) for i in range(3)]


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_without_knots_it_is_the_base_optimizer_bit_for_bit(base):
    link = LinkConfig(r=2, target_modules=BODY)
    chained, plain = Net(), Net()
    opt = ChainOptimizer(base, chained, NeverKnots(), link=link, lr=0.03)
    # the same adapters on the twin model, trained by the base alone
    owner = ChainOptimizer(torch.optim.SGD, plain, NeverKnots(), link=link, lr=0.0)
    alone = base(owner.live.adapters(), lr=0.03)
    assert train(opt, chained, 20) == train(alone, plain, 20)
    assert all(torch.equal(p, q) for p, q in zip(chained.parameters(), plain.parameters()))


def test_a_knot_leaves_the_draws_of_other_layers_and_global_randomness_alone():
    models, another = [Net(), Net()], Net()
    torch_state = torch.get_rng_state()
    one = ChainOptimizer(torch.optim.SGD, models[0], NeverKnots(), link=LinkConfig(r=2, target_modules=BODY), lr=0.1)
    two = ChainOptimizer(
        torch.optim.SGD, models[1], NeverKnots(), link=LinkConfig(r=2, target_modules=["second"]), lr=0.1
    )
    one.tie(), two.tie()
    assert torch.equal(models[0].second.lora_A, models[1].second.lora_A)
    assert torch.equal(torch.get_rng_state(), torch_state)
    other = ChainOptimizer(
        torch.optim.SGD, another, NeverKnots(), link=LinkConfig(r=2, target_modules=BODY), lr=0.1, seed=1
    )
    assert not torch.equal(other.live.layers["second"].lora_A, one.chain[0].factors["second"].A)


def test_a_chain_of_length_m_has_m_links_and_reaches_their_summed_rank():
    model = nn.Sequential(nn.Linear(16, 16))
    g = torch.Generator().manual_seed(0)
    target, x = torch.randn(16, 16, generator=g), torch.randn(64, 16, generator=g)
    opt = ChainOptimizer(
        torch.optim.AdamW,
        model,
        EvenKnots(length=4, total_steps=80),
        link=LinkConfig(r=2, target_modules="all-linear"),
        lr=0.02,
    )
    for _ in range(80):
        (model(x) - x @ target).square().mean().backward()
        opt.step()
        opt.zero_grad()
    opt.finish()
    assert len(opt.chain) == 4
    assert opt.chain.effective_rank() == {"0": 8}


@pytest.mark.parametrize("train_", ["both", "A", "B"])
@pytest.mark.parametrize("init", ["gaussian", "kaiming", "orthogonal", "selector"])
def test_every_start_changes_nothing_and_trains_what_it_says(train_, init):
    model = Net(dtype=torch.float64)
    before = loss_of(model, 0, torch.float64).item()
    opt = ChainOptimizer(
        torch.optim.SGD,
        model,
        StepKnots(every=3),
        link=LinkConfig(r=2, lora_alpha=2, target_modules=BODY, init=init, train=train_),
        lr=0.1,
    )
    assert loss_of(model, 0, torch.float64).item() == pytest.approx(before, rel=1e-14)
    drawn = {name: getattr(model.first, name).clone() for name in ("lora_A", "lora_B")}
    train(opt, model, 2, dtype=torch.float64)
    moved = {name for name, value in drawn.items() if not torch.equal(getattr(model.first, name), value)}
    assert moved == {"both": {"lora_A", "lora_B"}, "A": {"lora_A"}, "B": {"lora_B"}}[train_]
    train(opt, model, 4, start=2, dtype=torch.float64)
    opt.finish()
    assert loss_of(model, 0, torch.float64).item() < before


def test_ranks_and_scalings_follow_their_rules():
    assert [LinkConfig(r=(8, 4)).rank_of(i) for i in range(4)] == [8, 4, 4, 4]
    assert [LinkConfig(r=lambda i: 8 >> i).rank_of(i) for i in range(3)] == [8, 4, 2]
    assert [LinkConfig(r=(8, 4)).scaling_of(i) for i in range(2)] == [2.0, 2.0]
    assert [LinkConfig(r=(8, 4), scaling="alpha/r").scaling_of(i) for i in range(2)] == [2.0, 4.0]
    assert [LinkConfig(r=(16, 4), scaling="rslora").scaling_of(i) for i in range(2)] == [4.0, 8.0]


@pytest.mark.parametrize("rank_change", ["resize", "mask"])
def test_masking_and_resizing_train_the_same_chain(rank_change):
    model = Net(dtype=torch.float64)
    link = LinkConfig(r=(3, 2, 1), target_modules=BODY, rank_change=rank_change)
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=4), link=link, lr=0.02)
    params = list(opt.live.adapters())
    losses = train(opt, model, 12, dtype=torch.float64)
    assert all(a is b for a, b in zip(params, opt.live.adapters()))
    assert params[0].shape[0] == (1 if rank_change == "resize" else 3)
    expected = Net(dtype=torch.float64)
    twin = ChainOptimizer(
        torch.optim.AdamW, expected, StepKnots(every=4), link=LinkConfig(r=(3, 2, 1), target_modules=BODY), lr=0.02
    )
    assert losses == pytest.approx(train(twin, expected, 12, dtype=torch.float64), rel=1e-12)


def test_draws_have_the_moments_they_promise():
    A, B = draw(LinkConfig(r=8, init="gaussian"), (40, 20000), seed=0, link=0, layer="x")
    assert A.shape == (8, 20000)
    assert B.shape == (40, 8)
    assert not B.any()
    # 160000 draws: 5 standard errors of a mean and of a standard deviation
    assert abs(A.mean().item()) < 5 / 8 / 400
    assert A.std().item() == pytest.approx(1 / 8, rel=5 / (2 * 160000) ** 0.5)
    U, _ = draw(LinkConfig(r=8), (40, 20000), seed=0, link=0, layer="x")
    assert U.abs().max().item() <= 20000**-0.5
    Q, _ = draw(LinkConfig(r=8, init="orthogonal"), (40, 64), seed=0, link=0, layer="x")
    assert torch.allclose(Q @ Q.T, torch.eye(8), atol=1e-5)
    S, _ = draw(LinkConfig(r=3, init="selector"), (40, 8), seed=0, link=2, layer="x")
    assert S.nonzero().tolist() == [[0, 6], [1, 7], [2, 0]]
