"""TRL's SFTTrainer on a chat set, with and without peft_config."""

import pytest
import torch

from cola import LinkConfig, StepKnots
from tests.models import tiny_opt

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from cola.integrations.transformers import attach  # noqa: E402

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", "tie", "a", "knot", "done", "again", "."]
TEMPLATE = "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"


def tokenizer():
    """A word-level tokenizer with a chat template, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special)


def chats(n=8):
    turn = [{"role": "user", "content": "tie a knot ."}, {"role": "assistant", "content": "done ."}]
    more = [*turn, {"role": "user", "content": "again ."}, {"role": "assistant", "content": "done again ."}]
    return datasets.Dataset.from_dict({"messages": [turn if i % 2 else more for i in range(n)]})


@pytest.mark.parametrize("how", ["stack", "requantize"])
def test_sft_trainer_on_a_quantised_base(tmp_path, how):
    """QLoRA, as TRL sets it up: the links go on PEFT's quantised layers."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    import transformers

    tiny_opt(hidden_size=64, word_embed_proj_dim=64).save_pretrained(tmp_path / "base")

    def load():
        bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        kind = transformers.OPTForCausalLM
        return kind.from_pretrained(tmp_path / "base", quantization_config=bits, device_map="cpu").train()

    args = trl.SFTConfig(
        str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=2, learning_rate=0.02, report_to=[],
        disable_tqdm=True, use_cpu=True, bf16=False, max_length=32, dataset_num_proc=None,
    )  # fmt: skip
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    trainer = trl.SFTTrainer(load(), args, train_dataset=chats(), processing_class=tokenizer(), peft_config=config)
    opt = attach(trainer, torch.optim.AdamW, StepKnots(every=2), quantized=how)
    trainer.train()
    assert [(entry.step, entry.rank) for entry in opt.chain] == [(2, 2), (4, 2), (6, 2)]
    lost = [entry["knot_lost_norm"] for entry in trainer.state.log_history if "knot" in entry]
    # powers of two fold into B exactly; the codes' steps are wider than these links
    assert lost == [0, 0, 0] if how == "stack" else min(lost) > 0.01
    rebuilt, ids = load(), torch.arange(12).view(1, 12)
    opt.chain.apply(rebuilt)
    assert torch.equal(rebuilt(input_ids=ids).logits, trainer.model.train()(input_ids=ids).logits)


@pytest.mark.parametrize("with_peft", [False, True], ids=["plain", "peft_config"])
def test_sft_trainer(tmp_path, with_peft, caplog):
    config = None
    if with_peft:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    args = trl.SFTConfig(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, learning_rate=0.02, save_steps=4, report_to=[],
        disable_tqdm=True, use_cpu=True, bf16=False, max_length=32, dataset_num_proc=None, logging_steps=3,
    )  # fmt: skip
    trainer = trl.SFTTrainer(tiny_opt(), args, train_dataset=chats(), processing_class=tokenizer(), peft_config=config)
    link = LinkConfig() if with_peft else LinkConfig(r=2, lora_alpha=4)
    opt = attach(trainer, torch.optim.AdamW, StepKnots(every=2), link=link)
    trainer.train()
    assert [(entry.step, entry.rank) for entry in opt.chain] == [(2, 2), (4, 2), (6, 2)]
    history = trainer.state.log_history
    knots, losses = ([entry for entry in history if key in entry] for key in ("knot", "loss"))
    assert [entry["step"] for entry in knots] == [2, 4, 6]
    # TRL's averages belong to the losses of the same steps
    assert [entry["step"] for entry in losses if "mean_token_accuracy" in entry] == [3, 6]
    assert not any("mean_token_accuracy" in entry for entry in knots)
    assert "call unload()" not in caplog.text  # the trainer does it
    assert all(entry.report.loss > 0 for entry in opt.chain)
    trainer.save_model(str(tmp_path / "final"))
    saved = type(tiny_opt()).from_pretrained(tmp_path / "final")
    # the ledger rebuilds what was saved from the untouched model
    rebuilt = tiny_opt()
    opt.chain.apply(rebuilt, check=not with_peft or rebuilt.dtype == saved.dtype)
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), rebuilt.parameters()))
