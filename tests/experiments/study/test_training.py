"""The training loop, and the control's setting: the schedule, what is recorded, what a seed decides."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_model

from cola import Chain
from experiments.frontier.demo import Finished
from experiments.methods import Method
from experiments.study import cells, control, text
from experiments.study.arms import require_possible
from experiments.study.cells import StudyCell, run
from experiments.study.control import SCALING, preset
from experiments.study.training import WarmDecay, train
from experiments.sweep import Sweep
from experiments.tiny import corpus, tiny_opt
from experiments.tiny.loss import bits_per_byte, held_out_loss

ARMS = control.arms()


@pytest.fixture(autouse=True)
def prose(monkeypatch):
    short = corpus.prose({f"t{i}": f"topic {i} says this and that, {i * i} times. " * 12 for i in range(12)})
    monkeypatch.setattr(corpus, "prose", lambda: short)
    for cached in (text.splits, text.blocks):
        cached.cache_clear()
    yield short
    for cached in (text.splits, text.blocks):
        cached.cache_clear()


@pytest.fixture
def model():
    return tiny_opt.fresh(tiny_opt.config(width=32, layers=1, heads=2, context=32), seed=0)


@pytest.fixture
def setting(model, tmp_path):
    tiny_opt.save(tiny_opt.fresh(model.config, seed=0), tmp_path / "model", {})
    return preset(model=str(tmp_path / "model"), epochs=2, train_bytes=2048, context=32, batch_size=16, warmup=1)


def cell(setting, arm, lr=1e-2, seed=0):
    return StudyCell(setting, ARMS[arm].method, lr, seed)


def trained(setting, arm, model, seed=0):
    """A run of the loop on this model."""
    of = cell(setting, arm, seed=seed)
    return train(model, of.optimizer(model), setting.read(seed), setting.schedule())


def test_the_rate_decays_over_the_run_and_rises_after_every_knot():
    factor = WarmDecay(total=10, warmup=1)
    assert factor(0, []) == 0.5
    assert [factor(step, []) for step in (1, 5, 9, 10)] == pytest.approx([0.9, 0.5, 0.1, 0.0])
    assert factor(5, [5]) == pytest.approx(0.25)
    assert factor(6, [2, 5]) == pytest.approx(0.4)


def test_the_decay_may_start_late():
    factor = WarmDecay(total=10, decay=0.4)
    assert [factor(step, []) for step in (0, 5, 6, 8, 10)] == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0])


def test_the_default_schedule_is_the_papers_whatever_is_tied():
    assert [WarmDecay(240)(step, [step // 2]) for step in range(241)] == [1 - step / 240 for step in range(241)]


@pytest.mark.parametrize("name", list(ARMS))
def test_every_arm_trains_and_leaves_a_plain_model(name, model, setting):
    keys, before = list(model.state_dict()), {n: p.clone() for n, p in model.named_parameters()}
    outcome = trained(setting, name, model)
    assert list(model.state_dict()) == keys
    assert all(type(module).__module__.split(".")[0] != "cola" for module in model.modules())
    assert len(outcome.losses) == setting.steps()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    if name == "full":
        assert changed == set(before)
        assert outcome.parameters == sum(p.numel() for p in before.values())
    else:
        assert {n.split(".")[-2] for n in changed} == {"q_proj", "v_proj"}
        assert outcome.parameters == 2 * ARMS[name].method.ranks[0] * (32 + 32)
        assert outcome.knots[-1].step == setting.steps()


@pytest.mark.parametrize(
    "name, ranks", [("lora", [8]), ("cola-2", [8, 8]), ("cola-3", [8, 8, 8]), ("cola-stepdown", [8, 4])]
)
def test_planned_chains_have_their_links(name, ranks, model, setting):
    assert [knot.rank for knot in trained(setting, name, model).knots] == ranks


@pytest.mark.parametrize("rank", [8, 4])
@pytest.mark.parametrize("name", ["lora", "lora-wide", "cola-stepdown"])
def test_the_scaling_is_the_papers_at_every_rank(name, rank, model, setting):
    of = StudyCell(setting, control.arms(rank)[name].method, 1e-2, 0)
    optimizer = of.optimizer(model)
    train(model, optimizer, setting.read(0), setting.schedule())
    scalings = {factor.scaling for link in optimizer.chain for factor in link.factors.values()}
    assert scalings == {SCALING}


def test_a_seed_decides_everything(model, setting):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = []
    for seed in (0, 0, 1):
        model.load_state_dict(state)
        torch.manual_seed(len(found))  # the global generator must not matter
        found.append((trained(setting, "cola-2", model, seed).losses, held_out_loss(model, setting.blocks().dev)))
    assert found[0] == found[1] != found[2]


def test_arms_see_the_same_text_at_the_same_step(model, setting):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    first = []
    for name in ("lora", "full"):
        model.load_state_dict(state)
        first.append(trained(setting, name, model, 3).losses[0])
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_what_is_between_epochs_is_called_there(model, setting):
    seen, losses = [], []
    model.register_forward_pre_hook(lambda *_: losses.append(None))
    optimizer = cell(setting, "lora").optimizer(model)
    train(model, optimizer, setting.read(0), setting.schedule(), between=lambda: seen.append(len(losses)))
    assert seen == [setting.steps_per_epoch()]


def test_a_run_leaves_weights_and_a_chain_that_gives_them(setting, tmp_path, prose):
    sweep = Sweep(tmp_path / "sweep", run, cells.name)
    of = cell(setting, "cola-3")
    done = sweep.carry_out(lambda done: [of, of.tested] if of in done else [of], workers=1, progress=False)
    model, text = tiny_opt.load(tmp_path / "model"), prose.text
    untouched = StudyCell(setting, Method("zero-shot"), 0.0, 0).tested
    expected = {"test": held_out_loss(model, corpus.blocks(text["test"], 32)), "rebuilt": None}
    assert run(untouched, tmp_path / "untouched") == expected
    load_model(model, str(sweep.place(of) / cells.WEIGHTS))
    assert done[of.tested] == {"test": held_out_loss(model, corpus.blocks(text["test"], 32)), "rebuilt": 0.0}
    assert done[of]["dev"] == held_out_loss(model, corpus.blocks(text["validation"], 32))
    assert len(Chain.load(sweep.place(of) / cells.CHAIN)) == len(done[of]["knots"]) == 3
    # a chain that is not the run's is found out
    other = tiny_opt.load(tmp_path / "model")
    optimizer = cell(setting, "cola-3", seed=1).optimizer(other)
    train(other, optimizer, setting.read(1), setting.schedule())
    optimizer.chain.save(sweep.place(of) / cells.CHAIN)
    assert run(of.tested, sweep.place(of.tested))["rebuilt"] > 1e-6


def test_a_loss_that_is_not_finite_names_the_run(setting, tmp_path):
    model = tiny_opt.fresh(tiny_opt.config(width=32, layers=1, heads=2, context=32), seed=0)
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight.fill_(math.nan)
    tiny_opt.save(model, tmp_path / "nan", {})
    of = cell(dataclasses.replace(setting, model=str(tmp_path / "nan")), "full", seed=5)
    outcome = run(of, tmp_path)
    assert outcome == {"diverged": "the loss is nan at step 1"}
    with pytest.raises(FloatingPointError, match=r"finetune, lr=0.01, seed=5: the loss is nan at step 1"):
        Finished(runs=1, kept=0, workers=1)(of, outcome)


def test_bits_per_byte_of_a_uniform_model_are_the_vocabularys(model):
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight.zero_()  # tied to the output layer
    text = bytes(range(256)) * 2
    assert bits_per_byte(model, text, 32) == pytest.approx(math.log2(corpus.VOCABULARY), rel=1e-6)
    assert held_out_loss(model, corpus.blocks(text, 32)) == pytest.approx(math.log(corpus.VOCABULARY), rel=1e-6)
    model.train()
    assert bits_per_byte(model, text, 32, batch=3) == pytest.approx(math.log2(257), rel=1e-6)
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


def test_ranks_keep_their_ratio_and_labels_say_them(model, setting):
    assert control.arms()["cola-stepdown"].label == "COLA, ranks 8, 4"
    assert control.arms(2)["cola-stepdown"].label == "COLA, ranks 2, 1"
    assert control.arms(1)["cola-stepdown"].method.ranks == (1, 1)
    assert control.arms()["lora-wide"].label == "LoRA, rank 24"
    other = dataclasses.replace(setting, targets=("all-linear",))
    method = dataclasses.replace(control.arms(4)["cola-stepdown"].method, init="kaiming")
    link = StudyCell(other, method, 1e-3, 0).optimizer(model).live.config
    assert (link.r, link.lora_alpha, link.target_modules, link.init) == ((4, 2), 8.0, "all-linear", "kaiming")


def test_arms_that_cannot_be_are_named_with_what_is_left(model, setting):
    def set_up(arm, model):
        return StudyCell(setting, arm.method, arm.start, 0).optimizer(model)

    wide = control.arms(16)  # of which the widest, 48, is above the width of 32
    before = {name: p.clone() for name, p in model.named_parameters()}
    require_possible(ARMS, model, set_up)
    with pytest.raises(ValueError, match=r"arm lora-wide \(LoRA, rank 48\): r=48 .* 32x32.*\n.*--arms lora full$"):
        require_possible({name: wide[name] for name in ("lora", "lora-wide", "full")}, model, set_up)
    with pytest.raises(ValueError, match="choose other --arms"):
        require_possible({"lora-wide": wide["lora-wide"]}, model, set_up)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
