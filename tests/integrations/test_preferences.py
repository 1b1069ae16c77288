"""TRL's preference and reward trainers: the loss that the policy sees, and a reference that no knot moves."""

import copy

import pytest
import torch

from cola import KnotPolicy, LinkConfig, StepKnots
from tests.integrations.test_trl import tokenizer
from tests.models import seeded

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

from cola.integrations.transformers import attach  # noqa: E402

LINK = LinkConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
ADAPTER = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
SIZES = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
QUIET = {
    "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.02, "report_to": [], "disable_tqdm": True,
    "use_cpu": True, "bf16": False, "logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant",
}  # fmt: skip


class Sees(KnotPolicy):
    """Keeps the losses, and ties after every second step."""

    def __init__(self):
        self.losses = []

    def update(self, signal):
        self.losses.append(float(signal.loss))
        return signal.step % 2 == 0


@pytest.fixture
def load(tmp_path):
    """Loads a tiny model from where TRL will look for its reference."""
    seeded(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES), 0).save_pretrained(tmp_path / "base")
    return lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def pairs():
    prompt = ["user : tie a knot .", "user : again ."] * 4
    chosen, rejected = ["assistant : done", "assistant : done again ."] * 4, ["assistant : a", "assistant : tie"] * 4
    return datasets.Dataset.from_dict({"prompt": prompt, "chosen": chosen, "rejected": rejected})


def labelled():
    columns = {"prompt": ["user : tie ."] * 8, "completion": ["a knot .", "done again"] * 4, "label": [True, False] * 4}
    return datasets.Dataset.from_dict(columns)


def prompts():
    return datasets.Dataset.from_dict({"prompt": ["user : tie a", "user : again"] * 4})


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def dpo(model, out, args=(), **kwargs):
    args = trl.DPOConfig(str(out), **{**QUIET, **dict(args)})
    return trl.DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer(), **kwargs)


def kto(model, out, args=(), **kwargs):
    args = trl.KTOConfig(str(out), **{**QUIET, **dict(args)})
    return trl.KTOTrainer(model, args=args, train_dataset=labelled(), processing_class=tokenizer(), **kwargs)


def online(name):
    def make(model, out, args=(), **kwargs):
        config = getattr(trl, f"{name}Config")
        args = config(str(out), num_generations=2, max_completion_length=4, **{**QUIET, **dict(args)})
        return getattr(trl, f"{name}Trainer")(
            model, length, args=args, train_dataset=prompts(), processing_class=tokenizer(), **kwargs
        )

    return make


KINDS = {"DPO": dpo, "KTO": kto, "GRPO": online("GRPO"), "RLOO": online("RLOO")}
WITH_REFERENCE = {"DPO": {}, "KTO": {}, "GRPO": {"beta": 0.1}, "RLOO": {"beta": 0.1}}


def logps(model):
    ids = torch.arange(3, 13).view(2, 5)
    with torch.no_grad():
        return model(input_ids=ids).logits.log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_that_is_the_adapter_switched_off_is_refused(tmp_path, load, kind):
    trainer = KINDS[kind](load(), tmp_path, WITH_REFERENCE[kind], peft_config=ADAPTER)
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"reference of {kind}Trainer is the PeftModel with its adapter off.*plain"):
        attach(trainer, torch.optim.AdamW, StepKnots(every=2))
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.optimizer is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_adapter_is_refused(tmp_path, load, kind):
    trainer = KINDS[kind](peft.get_peft_model(load(), ADAPTER), tmp_path, WITH_REFERENCE[kind])
    with pytest.raises(ValueError, match=r"added the adapter 'ref'.*ref_model="):
        attach(trainer, torch.optim.AdamW, StepKnots(every=2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_models_reference_stays_to_the_last_bit(tmp_path, load, kind):
    """Here TRL loads a reference of its own."""
    trainer = KINDS[kind](load(), tmp_path, WITH_REFERENCE[kind])
    policy, before = Sees(), logps(trainer.ref_model)
    opt = attach(trainer, torch.optim.AdamW, policy, link=LINK)
    during = []
    opt.on_knot(lambda report: during.append(logps(trainer.ref_model)))
    trainer.train()
    assert len(during) == 2
    assert all(torch.equal(before, later) for later in during)
    assert torch.equal(before, logps(load()))
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert policy.losses == pytest.approx(logged, rel=1e-6)


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
@pytest.mark.parametrize("how", ["ref_model", "precomputed"])
def test_a_fixed_reference_of_a_peft_model_is_allowed(tmp_path, load, kind, how):
    """The margins of a run with knots are those against the base, computed apart."""
    args = {"precompute_ref_log_probs": True} if how == "precomputed" else {}
    kwargs = {"ref_model": load()} if how == "ref_model" else {}
    trainer = KINDS[kind](load(), tmp_path, args, peft_config=ADAPTER, **kwargs)
    policy, references = Sees(), []
    opt = attach(trainer, torch.optim.AdamW, policy)
    if how == "ref_model":
        opt.on_knot(lambda report: references.append(logps(trainer.ref_model)))
    else:
        names = [name for name in trainer.train_dataset.column_names if name.startswith("ref_")]
        assert names
        opt.on_knot(lambda report: references.append(torch.tensor(trainer.train_dataset[names[0]][:])))
    trainer.train()
    assert len(references) == 2
    assert torch.equal(*references)
    if how == "ref_model":
        assert torch.equal(references[0], logps(load()))
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert policy.losses == pytest.approx(logged, rel=1e-6)


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_without_a_reference_a_peft_model_is_allowed(tmp_path, load, kind):
    trainer = KINDS[kind](load(), tmp_path, {"beta": 0.0, "gradient_accumulation_steps": 2}, peft_config=ADAPTER)
    policy = Sees()
    attach(trainer, torch.optim.AdamW, policy)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert policy.losses == pytest.approx(logged, rel=1e-6, abs=1e-7)


def test_a_reference_that_shares_weights_is_refused(tmp_path, load):
    model, shared = load(), load()
    shared.model.layers[1].self_attn.q_proj.weight = model.model.layers[1].self_attn.q_proj.weight
    trainer = dpo(model, tmp_path, ref_model=shared)
    with pytest.raises(ValueError, match=r"ref_model shares the weight 'model.layers.1.self_attn.q_proj.weight'"):
        attach(trainer, torch.optim.AdamW, StepKnots(every=2), link=LINK)
    elsewhere = LinkConfig(r=2, target_modules=["k_proj"])
    attach(trainer, torch.optim.AdamW, StepKnots(every=2), link=elsewhere)  # no knot moves that weight


def test_averaged_references_and_vllm_are_refused(tmp_path, load):
    trainer = dpo(load(), tmp_path, {"sync_ref_model": True, "ref_model_sync_steps": 1})
    with pytest.raises(ValueError, match="SyncRefModelCallback averages"):
        attach(trainer, torch.optim.AdamW, StepKnots(every=2), link=LINK)
    trainer = KINDS["GRPO"](load(), tmp_path)
    trainer.args.use_vllm = True
    with pytest.raises(ValueError, match=r"use_vllm=True .* set use_vllm=False"):
        attach(trainer, torch.optim.AdamW, StepKnots(every=2), link=LINK)
    trainer = KINDS["GRPO"](load(), tmp_path)
    attach(trainer, torch.optim.AdamW, StepKnots(every=2), link=LINK)
    trainer.add_callback(trl.BEMACallback())
    with pytest.raises(ValueError, match="BEMACallback averages"):
        trainer.train()


def test_a_reward_model_trains_with_the_loss_that_is_logged(tmp_path):
    config = transformers.LlamaConfig(num_labels=1, **SIZES)
    model = seeded(transformers.LlamaForSequenceClassification, config, 0)
    args = trl.RewardConfig(str(tmp_path), gradient_accumulation_steps=2, **QUIET)
    trainer = trl.RewardTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer())
    policy, head = Sees(), copy.deepcopy(model.score.weight)
    attach(trainer, torch.optim.AdamW, policy, link=LinkConfig(r=2, modules_to_save=["score"]))
    trainer.train()
    assert not torch.equal(head, model.score.weight)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert policy.losses == pytest.approx(logged, rel=1e-6)


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["plain", "peft"])
def test_sft_trains_with_the_loss_that_is_logged(tmp_path, load, adapter):
    args = trl.SFTConfig(str(tmp_path), gradient_accumulation_steps=3, max_length=16, **QUIET)
    data = datasets.Dataset.from_dict({"text": ["tie a knot .", "again . done . a knot", "knot a tie"] * 5})
    trainer = trl.SFTTrainer(load(), args, train_dataset=data, processing_class=tokenizer(), peft_config=adapter)
    policy = Sees()
    attach(trainer, torch.optim.AdamW, policy, link=LinkConfig() if adapter else LINK)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert policy.losses == pytest.approx(logged, rel=1e-6)
