"""One run: the schedule, what is recorded, what a seed decides, what is left alone."""

import math

import pytest
import torch

from experiments import corpus, tiny_opt
from experiments.arms import ARMS, SCALING, Adapters
from experiments.evaluation import bits_per_byte
from experiments.train import Setting, WarmDecay, fine_tune

SETTING = Setting(epochs=2, train_bytes=2048, context=32, batch_size=16, warmup=1)


@pytest.fixture(scope="module")
def prose():
    return corpus.prose({f"t{i}": f"topic {i} says this and that, {i * i} times. " * 12 for i in range(12)})


@pytest.fixture
def model():
    return tiny_opt.fresh(tiny_opt.config(width=32, layers=1, heads=2, context=32), seed=0)


def test_the_rate_decays_over_the_run_and_rises_after_every_knot():
    ties = []
    factor = WarmDecay(total=10, warmup=1, ties=ties)
    assert factor(0) == 0.5
    assert [factor(step) for step in (1, 5, 9, 10)] == pytest.approx([0.9, 0.5, 0.1, 0.0])
    ties.append(5)
    assert factor(5) == pytest.approx(0.25)
    assert factor(6) == pytest.approx(0.4)


def test_the_decay_may_start_late():
    factor = WarmDecay(total=10, warmup=0, ties=[], decay=0.4)
    assert [factor(step) for step in (0, 5, 6, 8, 10)] == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("name", list(ARMS))
def test_every_arm_trains_and_leaves_a_plain_model(name, model, prose):
    keys, before = list(model.state_dict()), {n: p.clone() for n, p in model.named_parameters()}
    outcome = fine_tune(model, ARMS[name], 1e-2, 0, SETTING, prose)
    assert list(model.state_dict()) == keys
    assert all(type(module).__module__.split(".")[0] != "cola" for module in model.modules())
    steps = SETTING.epochs * SETTING.steps_per_epoch(prose)
    assert len(outcome.losses) == steps
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    if name == "full":
        assert changed == set(before)
        assert outcome.parameters == sum(p.numel() for p in before.values())
    else:
        assert {n.split(".")[-2] for n in changed} == {"q_proj", "v_proj"}
        first = Adapters().ranks(ARMS[name].shares)[0]
        assert outcome.parameters == 2 * first * (32 + 32)
        assert outcome.knots[-1].step == steps


@pytest.mark.parametrize(
    "name, ranks", [("lora", [8]), ("cola-2", [8, 8]), ("cola-3", [8, 8, 8]), ("cola-stepdown", [8, 4])]
)
def test_planned_chains_have_their_links(name, ranks, model, prose):
    outcome = fine_tune(model, ARMS[name], 1e-2, 0, SETTING, prose)
    assert [knot.rank for knot in outcome.knots] == ranks


@pytest.mark.parametrize("name", ["lora", "lora-wide", "cola-stepdown"])
def test_the_scaling_is_the_papers_at_every_rank(name, prose):
    model = tiny_opt.fresh(tiny_opt.config(width=32, layers=1, heads=2, context=32), seed=0)
    optimizer = ARMS[name].optimizer(model, Adapters(), lr=1e-2, seed=0, total_steps=2)
    ids = next(corpus.epoch(prose.text["train"], 32, 4, torch.Generator()))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finish()
    scalings = {factor.scaling for link in optimizer.chain for factor in link.factors.values()}
    assert scalings == {SCALING}


def test_a_seed_decides_everything(model, prose):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = []
    for seed in (0, 0, 1):
        model.load_state_dict(state)
        torch.manual_seed(len(found))  # the global generator must not matter
        outcome = fine_tune(model, ARMS["cola-2"], 1e-2, seed, SETTING, prose)
        found.append((outcome.losses, outcome.validation))
    assert found[0] == found[1] != found[2]


def test_arms_see_the_same_text_at_the_same_step(model, prose):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    first = []
    for name in ("lora", "full"):
        model.load_state_dict(state)
        first.append(fine_tune(model, ARMS[name], 1e-3, 3, SETTING, prose).losses[0])
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_a_loss_that_is_not_finite_names_the_run(model, prose):
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"full, lr=0.01, seed=5: loss nan at step 1"):
        fine_tune(model, ARMS["full"], 1e-2, 5, SETTING, prose)


def test_bits_per_byte_of_a_uniform_model_are_the_vocabularys(model):
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight.zero_()  # tied to the output layer
    text = bytes(range(256)) * 2
    assert bits_per_byte(model, text, 32) == pytest.approx(math.log2(corpus.VOCABULARY), rel=1e-6)
    model.train()
    assert bits_per_byte(model, text, 32, batch_size=3) == pytest.approx(math.log2(257), rel=1e-6)
    assert model.training


def test_a_checkpoint_comes_back_rounded_to_fp16(model, tmp_path):
    expected = {key: value.half().float() for key, value in model.state_dict().items()}
    tiny_opt.save(model, tmp_path, {"seed": 0})
    loaded = tiny_opt.load(tmp_path)
    assert loaded.dtype == torch.float32
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors; make one with `python -m experiments"):
        tiny_opt.load(tmp_path / "nowhere")


def test_making_a_model_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    tiny_opt.fresh(tiny_opt.config(width=32, layers=1, heads=2, context=32), seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_ranks_keep_their_ratio_and_labels_say_them():
    assert ARMS["cola-stepdown"].title(Adapters()) == "COLA, ranks 8, 4"
    assert ARMS["cola-stepdown"].title(Adapters(rank=2)) == "COLA, ranks 2, 1"
    assert ARMS["lora-wide"].title(Adapters()) == "LoRA, rank 24"
    link = Adapters(rank=4, targets=("all-linear",), init="kaiming").link((1.0, 0.5))
    assert (link.r, link.lora_alpha, link.target_modules, link.init) == ((4, 2), 8.0, "all-linear", "kaiming")
