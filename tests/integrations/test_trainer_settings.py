"""What TrainingArguments says reaches the base optimizer, or attach says that it does not."""

import functools

import pytest
import torch

from cola import EvenKnots, LinkConfig, NeverKnots, StepKnots
from tests.integrations.test_trainer import LINK, peft_model, trainer_of
from tests.models import tiny_opt

transformers = pytest.importorskip("transformers")

from cola.integrations.transformers import attach  # noqa: E402

SETTINGS = {"learning_rate": 0.03, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
DECAY = {"lr": 0.03, "weight_decay": 0.1}
ADAM = {**DECAY, "betas": (0.8, 0.95), "eps": 1e-6}
Partial = functools.partial(torch.optim.AdamW, weight_decay=0.5, betas=(0.7, 0.9))


def lion(params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    return torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay)


def own_rate(params):
    return torch.optim.SGD(params, lr=0.5)


def open_ended(params, **kwargs):
    return torch.optim.SGD(params, **kwargs)


@pytest.mark.parametrize(
    ("base", "given", "wanted"),
    [
        (torch.optim.AdamW, {}, ADAM),
        (torch.optim.Adam, {}, ADAM),
        (torch.optim.NAdam, {}, ADAM),
        (torch.optim.AdamW, {"weight_decay": 0.2, "lr": 0.5}, {**ADAM, "weight_decay": 0.2, "lr": 0.5}),
        (torch.optim.AdamW, {"betas": (0.5, 0.6)}, {**ADAM, "betas": (0.5, 0.6)}),
        (torch.optim.SGD, {}, {**DECAY, "momentum": 0}),
        (torch.optim.SGD, {"momentum": 0.9}, {**DECAY, "momentum": 0.9}),
        (torch.optim.Adagrad, {}, {**DECAY, "eps": 1e-10}),  # not Adam's epsilon
        (torch.optim.RMSprop, {}, {**DECAY, "eps": 1e-8, "alpha": 0.99}),
        (torch.optim.Adafactor, {}, {**DECAY, "eps": (None, 1e-3)}),
        (Partial, {}, {**ADAM, "weight_decay": 0.5, "betas": (0.7, 0.9)}),
        (lion, {}, {**DECAY, "betas": (0.8, 0.95), "eps": 1e-8}),
        (own_rate, {}, {"lr": 0.5, "weight_decay": 0}),
        (open_ended, {}, {"lr": 0.03, "weight_decay": 0}),
    ],
)
def test_the_trainers_settings_reach_the_base_unless_given(tmp_path, base, given, wanted):
    trainer = trainer_of(tiny_opt(), tmp_path, **SETTINGS)
    opt = attach(trainer, base, NeverKnots(), link=LINK, **given)
    group = opt.param_groups[0]
    assert {name: group[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("text", "base", "wanted"),
    [
        ("momentum=0.9,nesterov=true", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ("momentum=0.9, dampening=0.1", torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}),
        ("weight_decay=0.3", torch.optim.AdamW, {"weight_decay": 0.3}),
        ("alpha=0.5,centered=True", torch.optim.RMSprop, {"alpha": 0.5, "centered": True}),
    ],
)
def test_optim_args_reach_the_base(tmp_path, text, base, wanted):
    opt = attach(trainer_of(tiny_opt(), tmp_path, optim_args=text), base, NeverKnots(), link=LINK)
    assert {name: opt.param_groups[0][name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim_args": "rank=4"}, r"optim_args='rank=4' has 'rank', which base=AdamW does not take"),
        ({"optim_args": "eps=small"}, r"eps='small' is neither a number"),
    ],
)
def test_settings_that_no_base_could_take_are_refused_with_the_model_untouched(tmp_path, changes, message):
    trainer = trainer_of(tiny_opt(), tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        attach(trainer, torch.optim.AdamW, NeverKnots(), link=LINK)
    assert type(trainer.model.model.decoder.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_an_optim_that_is_not_used_is_named(tmp_path, caplog):
    attach(trainer_of(tiny_opt(), tmp_path, optim="adafactor"), torch.optim.AdamW, NeverKnots(), link=LINK)
    assert "optim='adafactor' is not used: attach was given the base optimizer AdamW" in caplog.text


ADAMS = "adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-06"


@pytest.mark.parametrize(
    ("base", "given", "dropped"),
    [
        (torch.optim.AdamW, {}, None),
        (Partial, {"eps": 1e-4}, None),
        (torch.optim.SGD, {}, ADAMS),
        (open_ended, {}, f"weight_decay=0.1, {ADAMS}"),
        (open_ended, {"weight_decay": 0.2}, ADAMS),
        (own_rate, {}, f"learning_rate=0.03, weight_decay=0.1, {ADAMS}"),
    ],
)
def test_settings_that_the_base_has_no_place_for_are_named_once(tmp_path, caplog, base, given, dropped):
    attach(trainer_of(tiny_opt(), tmp_path, **SETTINGS), base, NeverKnots(), link=LINK, **given)
    said = [record.getMessage() for record in caplog.records if "TrainingArguments" in record.getMessage()]
    assert [message.partition("(")[2].partition(")")[0] for message in said] == ([] if dropped is None else [dropped])
    caplog.clear()
    attach(trainer_of(tiny_opt(), tmp_path), torch.optim.SGD, NeverKnots(), link=LINK)
    assert "TrainingArguments" not in caplog.text


def test_a_scheduler_of_another_optimizer_is_refused(tmp_path):
    model = tiny_opt()
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = trainer_of(model, tmp_path)
    trainer.lr_scheduler = torch.optim.lr_scheduler.StepLR(other, 2)
    with pytest.raises(ValueError, match="lr_scheduler, which belongs to another optimizer"):
        attach(trainer, torch.optim.AdamW, NeverKnots(), link=LINK)


def decays(trainer, opt):
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in opt.param_groups for p in group["params"]}


def test_biases_and_norms_do_not_decay_as_in_the_trainers_own_optimizer(tmp_path):
    link = LinkConfig(r=2, bias="lora_only", modules_to_save=["lm_head", "final_layer_norm"])
    trainer = trainer_of(tiny_opt(), tmp_path, weight_decay=0.1, max_steps=4, save_strategy="no")
    opt = attach(trainer, torch.optim.AdamW, StepKnots(every=2), link=link)
    found = decays(trainer, opt)
    assert {name for name, decay in found.items() if decay == 0} == {n for n in found if "bias" in n or "norm" in n}
    head = "model.decoder.embed_tokens.weight"  # shared with the head
    assert found[head] == found["model.decoder.layers.0.self_attn.q_proj.lora_A"] == 0.1
    trainer.train()
    assert len(opt.chain) == 2
    only = trainer_of(tiny_opt(), tmp_path, weight_decay=0.1)
    opt = attach(only, torch.optim.AdamW, NeverKnots(), link=LinkConfig(r=2, bias="lora_only"))
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    given = trainer_of(tiny_opt(), tmp_path, weight_decay=0.1)
    opt = attach(given, torch.optim.AdamW, NeverKnots(), link=link, weight_decay=0.2)
    assert {group["weight_decay"] for group in opt.param_groups} == {0.2}  # as ChainOptimizer takes it


def test_a_split_group_resumes_bit_for_bit(tmp_path):
    link = LinkConfig(r=2, bias="lora_only", modules_to_save=["lm_head"])

    def run(out, resume=None):
        trainer = trainer_of(tiny_opt(), out, weight_decay=0.1, save_only_model=resume is not None)
        attach(trainer, torch.optim.AdamW, StepKnots(every=2), link=link)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole = run(tmp_path)
    for lost in (None, "optimizer.pt"):
        if lost:
            (tmp_path / "checkpoint-3" / lost).unlink()
        resumed = run(tmp_path / "again", str(tmp_path / "checkpoint-3"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_schedule_and_clipping_are_the_trainers(tmp_path):
    trainer = trainer_of(
        tiny_opt(), tmp_path, lr_scheduler_type="cosine", warmup_steps=2, max_grad_norm=1e-3, logging_steps=1,
        save_strategy="no",
    )  # fmt: skip
    opt = attach(trainer, torch.optim.SGD, EvenKnots(length=2, total_steps=8), link=LINK)
    norms = []
    opt.register_step_pre_hook(
        lambda o, a, k: norms.append(sum(p.grad.square().sum() for p in opt.live.adapters()).sqrt().item())
    )
    trainer.train()
    assert max(norms) <= 1e-3 * (1 + 1e-4)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[:2] == [0.0, 0.01]
    assert rates[2] == 0.02
    assert rates[-1] < 0.002


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=["reentrant", "checkpointing", "neftune"],
)
@pytest.mark.parametrize("kind", [tiny_opt, peft_model], ids=["plain", "peft"])
def test_links_train_under_the_trainers_other_switches(tmp_path, kind, changes):
    trainer = trainer_of(kind(), tmp_path, max_steps=4, save_strategy="no", **changes)
    opt = attach(trainer, torch.optim.AdamW, StepKnots(every=2), link=LINK)
    trainer.train()
    assert all(link.report.layers and all(x.delta_norm > 0 for x in link.report.layers.values()) for link in opt.chain)
    assert len(opt.chain) == 2


def test_reentrant_checkpointing_of_pixels_is_refused(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=4, patch_size=2
    )
    trainer = trainer_of(
        transformers.ViTForImageClassification(config), tmp_path, activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )  # fmt: skip
    with pytest.raises(ValueError, match="use_reentrant=True lets no gradient through"):
        attach(trainer, torch.optim.AdamW, NeverKnots(), link=LINK)
