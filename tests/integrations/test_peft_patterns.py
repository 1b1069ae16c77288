"""PEFT's rank_pattern and alpha_pattern: layers of one link with ranks and scales of their own, from end to end."""

import copy

import pytest
import torch

from cola import Chain, ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from cola.cli import main
from cola.lora.config import LayerPlan
from tests.models import tiny_opt

peft = pytest.importorskip("peft")

IDS = torch.arange(48).view(4, 12) * 7 % 32
Q0, V0 = "model.decoder.layers.0.self_attn.q_proj", "model.decoder.layers.0.self_attn.v_proj"
Q1, V1 = Q0.replace(".0.", ".1."), V0.replace(".0.", ".1.")
#: rank and scale of each layer: r=4 and alpha=8 where no pattern says otherwise
PATTERNS = {"rank_pattern": {"v_proj": 2, "layers.0.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 3}}
OWN = {Q0: (6, 8 / 6), V0: (2, 1.5), Q1: (4, 2.0), V1: (2, 1.5)}


def wrapped(base=None, **changes):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **PATTERNS, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return peft.get_peft_model(tiny_opt() if base is None else base, peft.LoraConfig(**config))


def chained(model, policy=None, **kwargs):
    return ChainOptimizer(torch.optim.AdamW, model, policy or StepKnots(every=2), **{"lr": 0.05, **kwargs})


def train(model, opt, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        opt.zero_grad()
        loss = model(input_ids=IDS.roll(step, 1), labels=IDS.roll(step, 1)).loss
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def of(live):
    return {path: (layer.rank, layer.scaling) for path, layer in live.layers.items()}


@pytest.mark.parametrize("rslora", [False, True])
def test_each_layer_keeps_its_rank_and_scale_through_the_chain(rslora):
    model = wrapped(use_rslora=rslora)
    own = {p: (r, s * r**0.5) for p, (r, s) in OWN.items()} if rslora else OWN
    opt = chained(model)
    assert {path: layer[0] for path, layer in of(opt.live).items()} == {path: r for path, (r, _) in own.items()}
    before = logits(model)
    train(model.train(), opt, 4)
    assert of(opt.live) == {path: (r, pytest.approx(s)) for path, (r, s) in own.items()}
    for link in opt.chain:
        assert {p: (f.rank, f.scaling) for p, f in link.factors.items()} == of(opt.live)
        assert link.rank == 6  # the largest
    assert not torch.equal(logits(model), before)
    opt.finish()


def test_a_knot_adds_each_layers_own_update():
    model = wrapped()
    opt = chained(model, NeverKnots())
    train(model, opt, 3)
    weights = {path: layer.weight.detach().clone() for path, layer in opt.live.layers.items()}
    before = logits(model)
    updates = {p: x.scaling * x.lora_B.detach() @ x.lora_A.detach() for p, x in opt.live.layers.items()}
    opt.tie()
    for path, layer in opt.live.layers.items():
        # one addition in fp32, and a product summed in another order
        assert torch.allclose(layer.weight, weights[path] + updates[path], rtol=0, atol=1e-6)
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_the_chain_leaves_as_an_adapter_that_peft_loads_and_comes_back(tmp_path):
    model = wrapped()
    opt = chained(model)
    train(model, opt, 3)
    opt.finish()
    opt.chain.to_peft(tmp_path / "all")
    adapted = peft.PeftModel.from_pretrained(tiny_opt(), tmp_path / "all")
    assert torch.allclose(logits(adapted), logits(model), atol=1e-5)
    config = peft.LoraConfig.from_pretrained(tmp_path / "all")
    assert (config.r, config.rank_pattern, config.alpha_pattern) == (12, {}, {})  # two links, brought to one rank
    back = Chain.from_peft(tmp_path / "all")
    assert {path: factor.rank for path, factor in back[0].factors.items()} == {Q0: 12, V0: 4, Q1: 8, V1: 4}
    merged = tiny_opt()
    back.apply(merged)
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    # that adapter can be trained on, as it is: one rank and one scale
    again = peft.PeftModel.from_pretrained(tiny_opt(), tmp_path / "all", is_trainable=True)
    other = chained(again)
    assert set(of(other.live).values()) == {(12, 1.0)}
    train(again, other, 3)
    other.finish()
    opt.chain.to_peft(tmp_path / "small", r=3)
    adapted = peft.PeftModel.from_pretrained(tiny_opt(), tmp_path / "small")
    small = Chain.from_peft(tmp_path / "small")
    assert {factor.rank for factor in small[0].factors.values()} == {3}
    merged = tiny_opt()
    small.apply(merged)
    assert torch.allclose(logits(adapted), logits(merged), atol=1e-5)


def test_an_adapter_with_patterns_is_imported(tmp_path, capsys):
    model = wrapped(init_lora_weights=False)
    model.save_pretrained(tmp_path / "adapter")
    assert main(["import", str(tmp_path / "adapter"), "--out", str(tmp_path / "chain")]) == 0
    assert "4 layers of rank [2, 4, 6] are link 0" in capsys.readouterr().out
    chain = Chain.load(tmp_path / "chain")
    assert {path: (f.rank, f.scaling) for path, f in chain[0].factors.items()} == OWN
    merged = tiny_opt()
    chain.apply(merged)
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)


@pytest.mark.parametrize("steps", [2, 3, 5])
@pytest.mark.parametrize("link", [{}, {"r": (4, 2, 1)}, {"r": (4, 2), "scaling": "alpha/r"}], ids=str)
def test_it_resumes_bit_for_bit_in_both_ways(link, steps, tmp_path):
    link = LinkConfig(**link)
    model = wrapped()
    opt = chained(model, link=link)
    train(model, opt, steps)
    opt.save(tmp_path)
    states, here = copy.deepcopy((model.state_dict(), opt.state_dict())), of(opt.live)
    after = train(model, opt, 4, start=steps)
    again = wrapped()
    other = chained(again, link=link)
    other.load(tmp_path)
    assert train(again, other, 4, start=steps) == after
    again = wrapped()
    other = chained(again, link=link)
    again.load_state_dict(states[0])
    other.load_state_dict(states[1])
    assert of(other.live) == here
    assert train(again, other, 4, start=steps) == after


def test_a_schedule_of_ranks_takes_each_layer_down_in_proportion():
    """r_k of r_0 for every layer, rounded half up, at least 1; scales stay, or follow the layer's own rank."""
    model = wrapped()
    opt = chained(model, link=LinkConfig(r=(4, 2, 1), scaling="alpha/r"))
    train(model, opt, 6)
    opt.finish()
    ranks = [{path: factor.rank for path, factor in link.factors.items()} for link in opt.chain]
    assert ranks == [{Q0: 6, V0: 2, Q1: 4, V1: 2}, {Q0: 3, V0: 1, Q1: 2, V1: 1}, {Q0: 2, V0: 1, Q1: 1, V1: 1}]
    for link in opt.chain:
        for path, factor in link.factors.items():
            assert factor.scaling * factor.rank == pytest.approx(OWN[path][0] * OWN[path][1])
    masked = chained(wrapped(), link=LinkConfig(r=(4, 2), rank_change="mask"))
    train(masked.model, masked, 3)
    assert [layer.lora_A.shape[0] for layer in masked.live.layers.values()] == [2, 6, 2, 4]
    assert [layer.rank for layer in masked.live.layers.values()] == [1, 3, 1, 2]


def test_a_schedule_starts_with_the_rank_of_some_layer():
    with pytest.raises(ValueError, match=r"r=3\) starts with rank 3, and .* layers have rank 2 or 4 or 6"):
        chained(wrapped(), link=LinkConfig(r=3))
    opt = chained(wrapped(), link=LinkConfig(r=(6, 3)))
    assert {path: plan.rank_of(1) for path, plan in opt.live.plans.items()} == {Q0: 3, V0: 1, Q1: 2, V1: 1}


def test_a_state_of_other_patterns_is_refused():
    opt = chained(wrapped())
    train(opt.model, opt, 1)
    other = chained(wrapped(alpha_pattern={"v_proj": 3, "layers.1.self_attn.q_proj": 4}))
    with pytest.raises(ValueError, match="of another chain: layers differs"):
        other.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("rank", [1, 3, 8, 16])
def test_a_plan_without_its_own_numbers_is_the_configurations(rank):
    config = LinkConfig(r=(8, 4, 1), scaling="rslora")
    plan = LayerPlan(config, rank, config.lora_alpha / rank**0.5)
    assert plan.rank_of(0) == rank
    bare = LayerPlan(config)
    assert [bare.rank_of(k) for k in range(4)] == [config.rank_of(k) for k in range(4)]
    for k in range(4):
        assert bare.scaling_of(k) == config.scaling_of(k)
        assert plan.scaling_of(k) == pytest.approx(config.lora_alpha / plan.rank_of(k) ** 0.5)
