"""Quantised transformers models, with and without PEFT's own quantised layers, in a loop and in the Trainer."""

import logging

import pytest
import torch

from cola import Chain, ChainOptimizer, LinkConfig, StepKnots
from cola.lora.quantized import QUANTIZED
from cola.lora.stacked import StackedLinear
from tests.models import seeded, tiny_opt

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")
T = transformers

IDS = torch.arange(24).view(2, 12) * 5 % 32
LINK = LinkConfig(r=2, lora_alpha=3)
BOTH = pytest.mark.parametrize("how", QUANTIZED)
BITS = pytest.mark.parametrize("bits", [4, 8])
CONFIGS = {
    4: lambda: T.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    8: lambda: T.BitsAndBytesConfig(load_in_8bit=True),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def tiny_llama():
    config = T.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return seeded(T.LlamaForCausalLM, config, 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of the full-precision bases."""
    directory = tmp_path_factory.mktemp("bases")
    tiny_opt(hidden_size=64, word_embed_proj_dim=64, ffn_dim=96).save_pretrained(directory / "opt")
    tiny_llama().save_pretrained(directory / "llama")
    return directory


def load(directory, bits=4):
    kind = {"opt": T.OPTForCausalLM, "llama": T.LlamaForCausalLM}[directory.name]
    model = kind.from_pretrained(directory, quantization_config=CONFIGS[bits](), device_map="cpu")
    return model.train()  # in evaluation bitsandbytes may round the scales of a 4-bit layer (on some CPUs)


def wrapped(model, **changes):
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return peft.get_peft_model(model, config)


def train(opt, model, steps, start=0):
    for step in range(start, start + steps):
        opt.zero_grad()
        ids = IDS.roll(step, 1)
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@BITS
@BOTH
@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("layers", ["plain", "peft"])
def test_a_chain_on_a_quantised_model_and_its_ways_out(saved, bits, how, name, layers, tmp_path):
    base = load(saved / name, bits)
    model = wrapped(base) if layers == "peft" else base
    kwargs = {} if layers == "peft" else {"link": LINK}
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), lr=0.02, quantized=how, **kwargs)
    if layers == "peft":
        assert type(base.model.get_submodule(next(iter(opt.live.layers)).removeprefix("model."))).__module__ == (
            "peft.tuners.lora.bnb"
        )
    train(opt, model, 3)
    opt.save(tmp_path / "run")
    train(opt, model, 2, start=3)
    opt.finish()
    assert len(opt.chain) == 3
    # the codes, and what they are decoded with: a base of the same codes and other scales is another one
    path = opt.chain.layers()[0]
    assert opt.chain.base.layers[path].dtype == {4: "uint8", 8: "int8"}[bits]
    scales = {4: {"weight.absmax", "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4"}, 8: {"SCB"}}[bits]
    assert scales <= {name.removeprefix(f"{path}.") for name in opt.chain.base.others if name.startswith(path)}
    after = logits(model)

    again = load(saved / name, bits)
    other = ChainOptimizer(
        torch.optim.AdamW, wrapped(again) if layers == "peft" else again, StepKnots(every=2), lr=0.02, quantized=how,
        **kwargs,
    )  # fmt: skip
    other.load(tmp_path / "run")
    train(other, other.model, 2, start=3)
    other.finish()
    assert torch.equal(logits(other.model), after)

    fresh = load(saved / name, bits)
    opt.chain.apply(fresh)
    assert torch.equal(logits(fresh), after)

    opt.chain.to_peft(tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(load(saved / name, bits), tmp_path / "adapter").train()
    lost = max(link.report.lost_norm for link in opt.chain)
    if how == "stack":  # the same products in PEFT's order
        assert torch.allclose(logits(adapted), after, atol=1e-5)
    else:  # the adapter is W₀ + ΣΔ, and the codes miss some of it
        assert lost > 1e-3
        assert not torch.allclose(logits(adapted), after, atol=1e-5)

    if layers == "peft":
        unloaded = model.unload()
        assert type(unloaded) is type(fresh)
        assert torch.equal(logits(unloaded), after)


@BOTH
def test_a_trap_save_pretrained_has_the_requantised_weights_and_not_the_stacked_links(saved, how, tmp_path):
    model = load(saved / "opt")
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=LINK, lr=0.02, quantized=how)
    train(opt, model, 4)
    opt.finish()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, device_map="cpu").train()
    assert torch.equal(logits(again), logits(model)) == (how == "requantize")
    if how == "stack":  # what to do
        opt.chain.apply(again)
        assert torch.equal(logits(again), logits(model))


def test_peft_loads_the_chain_of_a_model_with_rank_and_alpha_patterns(saved, tmp_path):
    patterns = {"rank_pattern": {"v_proj": 1}, "alpha_pattern": {"layers.0.self_attn.q_proj": 5}}
    model = wrapped(load(saved / "llama"), **patterns)
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), lr=0.02)
    train(opt, model, 5)
    opt.finish()
    opt.chain.to_peft(tmp_path)
    adapted = peft.PeftModel.from_pretrained(load(saved / "llama"), tmp_path).train()
    assert torch.allclose(logits(adapted), logits(model), atol=1e-5)


# the Trainer, which trains quantised models under PEFT only


def trainer_of(model, out, **changes):
    arguments = {
        "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.02, "save_steps": 3, "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "seed": 0, **changes,
    }  # fmt: skip
    rows = torch.arange(16 * 8).view(16, 8) * 5 % 32
    data = [{"input_ids": row, "labels": row} for row in rows]
    return T.Trainer(model, T.TrainingArguments(str(out), **arguments), train_dataset=data)


@BOTH
@BITS
def test_the_trainer_resumes_a_quantised_chain_bit_for_bit(saved, bits, how, tmp_path, caplog):
    from cola.integrations.transformers import attach

    def start(out):
        trainer = trainer_of(wrapped(load(saved / "opt", bits), lora_dropout=0.1), out)
        return trainer, attach(trainer, torch.optim.AdamW, StepKnots(every=2), quantized=how)

    trainer, opt = start(tmp_path / "whole")
    trainer.train()
    assert len(opt.chain) == 4
    resumed, other = start(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(logits(resumed.model.train()), logits(trainer.model.train()))
    assert [link.report.delta_norm for link in opt.chain] == [link.report.delta_norm for link in other.chain]
    stacked = any(isinstance(module, StackedLinear) for module in trainer.model.modules())
    assert stacked == (how == "stack") == ("stacked on the quantised weights" in caplog.text)
    fresh = load(saved / "opt", bits)
    Chain.load(tmp_path / "whole" / "chain").apply(fresh)
    assert torch.equal(logits(fresh), logits(trainer.model))


@BOTH
def test_the_command_line_verifies_and_exports_a_quantised_chain(saved, how, tmp_path, capsys):
    from cola.cli import main

    model = load(saved / "llama")
    model.save_pretrained(tmp_path / "base")  # with its codes and their configuration
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=LINK, lr=0.02, quantized=how)
    train(opt, model, 5)
    opt.finish()
    opt.chain.save(tmp_path / "chain")
    assert main(["verify", str(tmp_path / "chain"), "--base", str(tmp_path / "base")]) == 0
    assert main(["inspect", str(tmp_path / "chain"), "--out", str(tmp_path / "plot")]) == 0
    assert main(["export", str(tmp_path / "chain"), "--out", str(tmp_path / "adapter")]) == 0
    capsys.readouterr()
    status = main(["merge", str(tmp_path / "chain"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "new")])
    said = capsys.readouterr().err
    assert status == 1
    if how == "stack":  # what it would write could not be read
        assert "links are stacked on quantised weights" in said
    else:
        assert "cannot save a LlamaForCausalLM that was loaded quantised" in said
    assert "cola export" in said
    adapted = peft.PeftModel.from_pretrained(load(saved / "llama"), tmp_path / "adapter").train()
    assert torch.allclose(logits(adapted), logits(model), atol=1e-5) == (how == "stack")


def test_in_bf16_with_gradient_checkpointing(saved):
    config = T.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = T.LlamaForCausalLM.from_pretrained(
        saved / "llama", quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    ).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=LINK, lr=0.02)
    train(opt, model, 3)
    before = logits(model)
    opt.finish()
    # one link of size ~1 is computed with s inside or outside B, in bf16 through two layers
    assert torch.allclose(logits(model), before, atol=0.1)
    assert model.model.layers[0].self_attn.q_proj.chain_A.dtype == torch.float32
