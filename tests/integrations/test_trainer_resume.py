"""Checkpoints of a Trainer that lack the optimizer's state: resumed from the chain beside them, or refused."""

import shutil

import pytest
import torch

from cola import Chain, LinkConfig, PlateauKnots, StepKnots
from tests.integrations.test_trainer import LINK, dropping_out, peft_model, same, trainer_of
from tests.models import tiny_mixtral, tiny_opt

transformers = pytest.importorskip("transformers")

from cola.integrations.transformers import attach  # noqa: E402


def policy():
    return StepKnots(at=[3, 5]) | PlateauKnots(window=3)


def whole_run(kind, out, link=LINK, **changes):
    trainer = trainer_of(kind(), out, **changes)
    opt = attach(trainer, torch.optim.AdamW, policy(), link=link)
    trainer.train()
    return trainer, opt


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("kind", [dropping_out, peft_model], ids=["plain", "peft"])
@pytest.mark.parametrize("step", [2, 4, 6])
def test_weights_alone_resume_bit_for_bit_from_the_chain(tmp_path, kind, step, schedule):
    """From the first link, the second and the third; dropout, schedule and batches go on too."""
    changes = {"save_only_model": True, "save_steps": 2, "lr_scheduler_type": schedule, "warmup_steps": 2}
    whole, opt = whole_run(kind, tmp_path, **changes)
    assert not (tmp_path / f"checkpoint-{step}" / "optimizer.pt").exists()
    part = trainer_of(kind(), tmp_path / "resumed", **changes)
    again = attach(part, torch.optim.AdamW, policy(), link=LINK)
    part.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert same(part.model, whole.model)
    assert [link.step for link in again.chain] == [link.step for link in opt.chain] == [3, 5, 8]
    assert part.state.log_history[-1]["step"] == 8
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert [e["learning_rate"] for e in part.state.log_history if "learning_rate" in e][-1] == rates[-1]


@pytest.mark.parametrize("step", [2, 4])
def test_links_on_fused_experts_resume_bit_for_bit(tmp_path, step):
    """In the first link and the second: save_pretrained would rename experts, and the Trainer loads by names."""
    link = LinkConfig(r=2, lora_alpha=2, target_modules="all")
    whole, _ = whole_run(tiny_mixtral, tmp_path, link, save_steps=2)
    part = trainer_of(tiny_mixtral(), tmp_path / "resumed")
    attach(part, torch.optim.AdamW, policy(), link=link)
    part.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert same(part.model, whole.model)


@pytest.mark.parametrize(
    "lost", [["optimizer.pt"], ["scheduler.pt"], ["optimizer.pt", "scheduler.pt", "rng_state.pth"]]
)
def test_a_file_that_is_missing_is_made_up_for(tmp_path, lost):
    whole, _ = whole_run(dropping_out, tmp_path)
    for name in lost:
        (tmp_path / "checkpoint-6" / name).unlink()
    part = trainer_of(dropping_out(), tmp_path / "resumed")
    attach(part, torch.optim.AdamW, policy(), link=LINK)
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same(part.model, whole.model)


@pytest.mark.parametrize("kind", [tiny_opt, peft_model], ids=["plain", "peft"])
def test_weights_alone_without_a_chain_are_refused_before_anything_moves(tmp_path, kind):
    whole_run(kind, tmp_path, save_only_model=True)
    shutil.rmtree(tmp_path / "checkpoint-3" / "chain")
    part = trainer_of(kind(), tmp_path / "resumed")
    opt = attach(part, torch.optim.AdamW, policy(), link=LINK)
    before = {name: value.clone() for name, value in part.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"lacks an optimizer's state.*save_only_model=False"):
        part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(before[name], value) for name, value in part.model.state_dict().items())
    assert opt.steps == 0


def test_a_users_own_log_sees_the_knots(tmp_path):
    seen = []

    class Told(transformers.Trainer):
        def log(self, logs, *args, **kwargs):
            seen.append(logs)
            super().log(logs, *args, **kwargs)

    trainer = trainer_of(tiny_opt(), tmp_path)
    trainer.__class__ = Told
    opt = attach(trainer, torch.optim.AdamW, policy(), link=LINK)
    trainer.train()
    assert [logs["knot"] for logs in seen if "knot" in logs] == list(range(len(opt.chain)))


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_run_that_has_all_its_steps_takes_none_more(tmp_path, weights_only):
    """Killed after its last checkpoint, within an epoch: transformers' loop takes a step before it looks."""
    changes = {"max_steps": 6, "save_only_model": weights_only}
    whole, opt = whole_run(dropping_out, tmp_path, **changes)
    part = trainer_of(dropping_out(), tmp_path / "resumed", **changes)
    again = attach(part, torch.optim.AdamW, policy(), link=LINK)
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.steps == opt.steps == 6
    assert same(part.model, whole.model)
    assert [link.step for link in again.chain] == [link.step for link in opt.chain] == [3, 5, 6]


@pytest.mark.parametrize("names", [["model.safetensors"], ["model.safetensors", "optimizer.pt", "scheduler.pt"]])
def test_a_checkpoint_that_was_cut_off_is_refused_as_such(tmp_path, names):
    """A kill in the middle of writing left it: the Trainer writes its own state last."""
    whole_run(tiny_opt, tmp_path)
    (tmp_path / "checkpoint-9").mkdir()
    for name in names:
        shutil.copy(tmp_path / "checkpoint-6" / name, tmp_path / "checkpoint-9")
    part = trainer_of(tiny_opt(), tmp_path)
    opt = attach(part, torch.optim.AdamW, policy(), link=LINK)
    with pytest.raises(ValueError, match=r"checkpoint-9': the checkpoint is not whole.*resume from the one before"):
        part.train(resume_from_checkpoint=True)
    assert opt.steps == 0


def test_the_links_alone_do_not_stand_in(tmp_path):
    """What `Chain.save` writes has no live link."""
    _, opt = whole_run(tiny_opt, tmp_path, save_only_model=True)
    shutil.rmtree(tmp_path / "checkpoint-3" / "chain")
    opt.chain.save(tmp_path / "checkpoint-3" / "chain")
    assert len(Chain.load(tmp_path / "checkpoint-3" / "chain")) == 3
    part = trainer_of(tiny_opt(), tmp_path / "resumed")
    attach(part, torch.optim.AdamW, policy(), link=LINK)
    with pytest.raises(ValueError, match="is no checkpoint of a chain"):
        part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_run_without_a_chain_cannot_be_resumed_as_one(tmp_path, weights_only):
    plain = trainer_of(tiny_opt(), tmp_path, save_only_model=weights_only)
    plain.train()
    part = trainer_of(tiny_opt(), tmp_path / "resumed")
    opt = attach(part, torch.optim.AdamW, policy(), link=LINK)
    wanted = "lacks an optimizer's state" if weights_only else "not saved by a ChainOptimizer"
    with pytest.raises(ValueError, match=wanted):
        part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert opt.steps == 0


def test_another_plan_or_link_is_refused_as_ever(tmp_path):
    whole_run(tiny_opt, tmp_path, save_only_model=True)
    part = trainer_of(tiny_opt(), tmp_path / "resumed")
    attach(part, torch.optim.AdamW, policy(), link=LinkConfig(r=3))
    with pytest.raises(ValueError, match="another chain"):
        part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_what_a_framework_writes_into_a_checkpoint_is_known_as_such(tmp_path):
    """A live link in a checkpoint is right; in what a user saves it is not."""
    trainer = trainer_of(tiny_opt(), tmp_path, max_steps=4)
    opt = attach(trainer, torch.optim.AdamW, policy(), link=LINK, finish=False)
    seen, save = [], trainer._save

    def noted(*args, **kwargs):
        seen.append(opt.live.note.in_checkpoint)
        save(*args, **kwargs)

    trainer._save = noted
    trainer.train()
    trainer.save_model(str(tmp_path / "by hand"))
    assert seen == [True, True, False]
