"""transformers' Trainer with a chain: what reaches the policy, what is logged, saved, resumed and given back."""

import copy
import json
from pathlib import Path

import pytest
import torch

from cola import Chain, ChainOptimizer, EpochKnots, LinkConfig, NeverKnots, PlateauKnots, StepKnots
from tests.models import tiny_opt

transformers = pytest.importorskip("transformers")

from cola.integrations.transformers import attach  # noqa: E402

LINK = LinkConfig(r=2, lora_alpha=2)


def examples(n=16):
    ids = torch.arange(n * 8).view(n, 8) * 5 % 32
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(model, out, **changes):
    arguments = {
        "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.02, "save_steps": 3, "logging_steps": 4,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0, **changes,
    }  # fmt: skip
    args = transformers.TrainingArguments(str(out), **arguments)
    return transformers.Trainer(model, args, train_dataset=examples(), eval_dataset=examples(4))


def dropping_out(**changes):
    """Dropout makes a resumed run differ unless every random state is restored."""
    return tiny_opt(dropout=0.1, **changes)


def peft_model():
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
        return peft.get_peft_model(dropping_out(), config)


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_epochs_losses_and_knots_travel_by_themselves(tmp_path):
    model = tiny_opt()
    names = list(model.state_dict())
    trainer = trainer_of(
        model, tmp_path, report_to=["tensorboard"], gradient_accumulation_steps=2, per_device_train_batch_size=3,
        max_steps=-1, num_train_epochs=4, save_strategy="no", logging_steps=3,
    )  # fmt: skip
    # 16 examples: 6 batches, 3 steps an epoch; knots after the steps that complete epochs 1 and 3
    opt = attach(trainer, torch.optim.AdamW, EpochKnots(at=[1, 3]), link=LINK)
    losses = []
    opt.on_knot(lambda report: losses.append(report.loss))
    trainer.train()
    assert [link.step for link in opt.chain] == [3, 9, 12]
    assert all(loss > 0 for loss in losses)
    knots = [entry for entry in trainer.state.log_history if "knot" in entry]
    # the losses asked for are there too, in the steps of knots as well
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 6, 9, 12]
    assert [(entry["knot"], entry["step"], entry["knot_rank"]) for entry in knots] == [(0, 3, 2), (1, 9, 2), (2, 12, 2)]
    json.dumps(trainer.state.log_history)
    assert opt.param_groups[0]["initial_lr"] == 0.02
    assert type(model.model.decoder.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert list(model.state_dict()) == names
    written = b"".join(f.read_bytes() for f in Path(tmp_path).rglob("*tfevents*")) or tensorboard_bytes()
    assert b"knot_delta_norm" in written


def tensorboard_bytes():
    """transformers 5 writes its runs below the working directory unless TENSORBOARD_LOGGING_DIR says where."""
    return b"".join(f.read_bytes() for f in Path().rglob("*tfevents*"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))


def test_the_final_model_is_the_merged_one_and_the_chain_rebuilds_it(tmp_path):
    base = tiny_opt()
    model = copy.deepcopy(base)
    trainer = trainer_of(model, tmp_path, save_strategy="no")
    attach(trainer, torch.optim.AdamW, StepKnots(every=3), link=LINK)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert same(type(base).from_pretrained(tmp_path / "final"), model)
    chain = Chain.load(tmp_path / "chain")
    assert len(chain) == 3
    chain.apply(base)
    assert same(base, model)
    with pytest.raises(RuntimeError, match=r"train\(\) was called again, .* make a new Trainer over the merged model"):
        trainer.train()


@pytest.mark.parametrize("kind", [dropping_out, peft_model], ids=["plain", "peft"])
@pytest.mark.parametrize("r", [2, (2, 1)], ids=str)
def test_resume_from_checkpoint_goes_on_bit_for_bit(tmp_path, kind, r):
    """From step 3, right after a knot, and from step 6, in the third link."""
    link = LinkConfig(r=r, lora_alpha=2)
    policy = lambda: StepKnots(at=[3, 5]) | PlateauKnots(window=3)  # noqa: E731
    whole = trainer_of(kind(), tmp_path)
    attach(whole, torch.optim.AdamW, policy(), link=link)
    whole.train()
    for step in (3, 6):
        part = trainer_of(kind(), tmp_path / "resumed")
        opt = attach(part, torch.optim.AdamW, policy(), link=link)
        part.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(part.model, whole.model)
        assert [entry.step for entry in opt.chain] == [3, 5, 8]
        # and our own files in it say the same
        assert len(Chain.load(tmp_path / f"checkpoint-{step}" / "chain")) == (1 if step == 3 else 2)


@pytest.mark.parametrize("kind", [tiny_opt, peft_model], ids=["plain", "peft"])
def test_the_best_model_comes_back_with_its_links(tmp_path, kind):
    """Best is step 2, in link 0; training goes on through two knots and another rank."""
    model = kind()
    trainer = trainer_of(
        model, tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
        lr_scheduler_type="constant",
    )  # fmt: skip
    losses = iter([1.0, 2.0, 3.0, 4.0])
    trainer.compute_metrics = None
    evaluate = trainer._determine_best_metric
    trainer._determine_best_metric = lambda metrics, trial: evaluate({**metrics, "eval_loss": next(losses)}, trial)
    link = LinkConfig(r=(2, 1), lora_alpha=2, scaling="alpha/r")
    opt = attach(trainer, torch.optim.AdamW, StepKnots(at=[3, 5]), link=link)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert [(entry.step, entry.rank) for entry in opt.chain] == [(2, 2)]
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        got = trainer.model.eval()(input_ids=ids).logits
    again = kind()
    stopped = trainer_of(again, tmp_path / "short", max_steps=2, lr_scheduler_type="constant", save_strategy="no")
    short = attach(stopped, torch.optim.AdamW, NeverKnots(), link=link)
    stopped.train()
    assert len(short.chain) == 1
    with torch.no_grad():
        wanted = stopped.model.eval()(input_ids=ids).logits
    assert got.shape == wanted.shape
    assert torch.allclose(got, wanted, atol=1e-5)


def test_a_peft_model_is_unloaded_and_saves_as_the_original_class(tmp_path):
    trainer = trainer_of(peft_model(), tmp_path, save_strategy="no")
    attach(trainer, torch.optim.AdamW, StepKnots(every=3))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert type(trainer.model) is transformers.OPTForCausalLM
    assert same(transformers.OPTForCausalLM.from_pretrained(tmp_path / "final"), trainer.model)
    assert "loss" in str(trainer.evaluate())


def test_bf16_mixed_precision(tmp_path):
    trainer = trainer_of(tiny_opt(), tmp_path, bf16=True, save_strategy="no")
    opt = attach(trainer, torch.optim.AdamW, StepKnots(every=3), link=LINK)
    trainer.train()
    assert len(opt.chain) == 3
    assert opt.chain[0].factors["model.decoder.layers.0.self_attn.q_proj"].A.dtype == torch.float32
    assert all(p.isfinite().all() for p in trainer.model.parameters())


BEST_OF_WEIGHTS_ALONE = {
    "load_best_model_at_end": True, "save_only_model": True, "eval_strategy": "steps", "eval_steps": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "prepare", "message"),
    [
        (BEST_OF_WEIGHTS_ALONE, None, "save_only_model=False"),
        ({}, lambda t: attach(t, torch.optim.SGD, NeverKnots(), link=LINK), "has an optimizer already"),
        ({}, lambda t: setattr(t, "is_deepspeed_enabled", True), "DeepSpeed, .* use DDP or FSDP2"),
        ({}, lambda t: setattr(t, "is_fsdp_enabled", True), "FSDP1, .* use FSDP2"),
        ({}, lambda t: setattr(t, "model_init", tiny_opt), "has model_init"),
        ({}, lambda t: setattr(t, "optimizer_cls_and_kwargs", (torch.optim.SGD, {})), "give attach the optimizer"),
    ],
)  # fmt: skip
def test_setups_that_would_break_a_chain_are_refused(tmp_path, changes, prepare, message):
    trainer = trainer_of(tiny_opt(), tmp_path, **changes)
    if prepare:
        prepare(trainer)
    with pytest.raises(ValueError, match=message):
        attach(trainer, torch.optim.AdamW, NeverKnots(), link=LINK)


def test_attach_wants_a_trainer():
    with pytest.raises(TypeError, match="must be a transformers Trainer"):
        attach(tiny_opt(), torch.optim.AdamW, NeverKnots())


def test_attach_understands_a_lora_config(tmp_path):
    peft = pytest.importorskip("peft")
    trainer = trainer_of(tiny_opt(), tmp_path)
    with pytest.raises(ValueError, match=r"link=LoraConfig\(\.\.\.\): use_dora=True"):
        attach(trainer, torch.optim.AdamW, NeverKnots(), link=peft.LoraConfig(use_dora=True))
    opt = attach(trainer, torch.optim.AdamW, NeverKnots(), link=peft.LoraConfig(r=2, lora_alpha=3))
    assert opt.live.config == LinkConfig(r=2, lora_alpha=3, rank_change="mask")


class Bare(transformers.Trainer):
    """A user's own trainer."""


@pytest.mark.parametrize("how", ["optimizers", "a subclass", "attach", "attach, finished by hand", "an own loop"])
def test_a_trainer_without_attach_is_recognised_once(how, tmp_path, caplog):
    model, kwargs = tiny_opt(), {"save_strategy": "no", "max_steps": 3, "logging_strategy": "no"}
    if how.startswith("attach"):
        trainer = trainer_of(model, tmp_path, **kwargs)
        attach(trainer, torch.optim.AdamW, StepKnots(every=2), link=LINK, finish=how == "attach", save_chain=False)
        trainer.train()
    else:
        opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=LINK, lr=0.02)
        if how == "an own loop":
            opt.model(**{k: v[None] for k, v in examples(1)[0].items()}).loss.backward()
            opt.step()
        else:
            kind = Bare if how == "a subclass" else transformers.Trainer
            args = trainer_of(tiny_opt(), tmp_path, **kwargs).args
            kind(model, args, train_dataset=examples(), optimizers=(opt, None)).train()
            opt.finish()
            assert len(opt.chain) == 2
    told = [record.getMessage() for record in caplog.records if "trains this chain without" in record.getMessage()]
    assert len(told) == (how in ("optimizers", "a subclass"))
    words = ("a transformers Trainer", "attach(trainer, base, policy=policy)", "call opt.finish() after training")
    assert all(part in message for message in told for part in words)
