"""A PEFT adapter comes in as a chain's first link, tied weights too; what is more than LoRA is refused."""

import json

import pytest
import torch

from cola import Chain, ChainOptimizer, LinkConfig, NeverKnots, StoreError
from cola.chain import files, tensorfile
from tests.cola.chain.opt_chains import IDS, close, fit, output
from tests.models import BODY, Net, tiny_gpt2, tiny_opt

peft = pytest.importorskip("peft")


IMPORTS = {
    "linear": (tiny_opt, {"target_modules": ["q_proj", "v_proj"]}),
    "conv1d": (tiny_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "rslora": (tiny_opt, {"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        tiny_opt,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2, "^model.decoder.layers.0.self_attn.q_proj": 5},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 7},
        },
    ),
    "expressions": (
        tiny_opt,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r".*layers\.\d+\.self_attn.(q|k)_proj": 2},
            "alpha_pattern": {r"^model\.decoder\.layers\.[01]\..*v_proj$": 7},
        },
    ),
    "all linear": (tiny_opt, {"target_modules": "all-linear"}),
    "biases": (tiny_opt, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "all biases": (tiny_opt, {"target_modules": ["q_proj"], "bias": "all"}),
    "modules to save": (Net, {"target_modules": BODY, "modules_to_save": ["head"]}),
}


def adapter(case, directory):
    """An adapter that PEFT made, with random factors; returns the model that PEFT merges it into."""
    make, options = IMPORTS[case]
    model = peft.get_peft_model(make(), peft.LoraConfig(r=3, lora_alpha=6, **options))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) / 4)
    model.save_pretrained(directory)
    return make, model.merge_and_unload()


@pytest.mark.parametrize("case", IMPORTS)
def test_a_peft_adapter_becomes_a_first_link(case, tmp_path):
    make, expected = adapter(case, tmp_path)
    chain, model = Chain.from_peft(tmp_path), make()
    assert not close(output(model), output(expected))
    chain.apply(model)
    assert close(output(model), output(expected))
    chain.save(tmp_path / "chain")
    Chain.load(tmp_path / "chain").to_peft(tmp_path / "again")
    assert close(output(peft.PeftModel.from_pretrained(make(), tmp_path / "again")), output(expected))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_weight_is_recorded_under_each_name(name, tmp_path):
    """PEFT replaces a module, not the tensor that it shares: both have to be in the adapter, and in the chain."""
    merged, chain = fit(tiny_opt(), modules_to_save=[name])
    assert set(chain[-1].trained) == {"lm_head.weight", "model.decoder.embed_tokens.weight"}
    chain.save(tmp_path / "chain")
    again = tiny_opt()
    Chain.load(tmp_path / "chain").apply(again)
    assert torch.equal(output(merged), output(again))
    chain.to_peft(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "model.decoder.embed_tokens"]
    # and through the adapter back, on a tied model and on an untied one
    for base in (tiny_opt(), untied()):
        Chain.from_peft(tmp_path / "adapter").apply(base)
        assert close(output(merged), output(base))


def untied():
    """The same values as `tiny_opt`'s, with a head of its own."""
    model = tiny_opt(tie_word_embeddings=False)
    model.load_state_dict(tiny_opt().state_dict())
    return model


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_weight_that_was_trained_alone_is_not_applied_to_a_tied_model(name, tmp_path):
    model = peft.get_peft_model(
        untied(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=[name])
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    model.save_pretrained(tmp_path)
    chain, tied, base = Chain.from_peft(tmp_path), tiny_opt(), untied()
    with pytest.raises(ValueError, match=r"apart from .* are one tensor .*: untie them first"):
        chain.apply(tied)
    assert torch.equal(output(tied), output(tiny_opt()))
    chain.apply(base)
    assert close(output(base), output(model))


def test_undo_of_a_tied_weight_from_weights_that_hold_it_once():
    model, chain = fit(tiny_opt(), links=1, modules_to_save=["lm_head"])
    weights = tiny_opt().state_dict()
    del weights["lm_head.weight"]
    chain.undo(model, weights)
    assert torch.equal(output(model), output(tiny_opt()))


def test_training_goes_on_after_an_imported_link(tmp_path):
    make, expected = adapter("linear", tmp_path / "adapter")
    model = make()
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LinkConfig(r=2), lr=0.05)
    opt.follow(Chain.from_peft(tmp_path / "adapter"))
    assert close(output(model), output(expected))
    model.train()
    for _ in range(3):
        opt.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        opt.step()
    opt.finish()
    assert [link.rank for link in opt.chain] == [3, 2]
    opt.chain.to_peft(tmp_path / "both")
    adapted = peft.PeftModel.from_pretrained(make(), tmp_path / "both")
    assert close(output(model), output(adapted))


REFUSED = {
    "DoRA": ({"use_dora": True}, "use_dora=True"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
    "not LoRA": ({"peft_type": "IA3"}, "of type 'IA3'"),
    "future": ({"some_new_variant": {"x": 1}}, "some_new_variant"),
    "lora bias": ({"lora_bias": True}, "lora_bias=True"),
    "replicated": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "rank": ({"r": 7}, "has rank 3, but adapter_config.json says otherwise"),
    "alpha": ({"lora_alpha": None}, "gives layer .* the rank or alpha None"),
    "infinite": ({"lora_alpha": 1e999}, "Infinity is not a finite number"),
    "huge": ({"lora_alpha": 10**400}, "the rank or alpha 10000"),
    "a truth": ({"lora_alpha": True}, "the rank or alpha True"),
    "pattern": ({"rank_pattern": {"(": 3}}, "bad pattern"),
    "slow pattern": ({"alpha_pattern": {"(a+)+": 3}}, "too intricate"),
    "alternatives": ({"alpha_pattern": {"(a|a|aa)" * 60: 3}}, "too intricate"),
    "options": ({"alpha_pattern": {"a?" * 60: 3}}, "too intricate"),
    "groups in groups": ({"alpha_pattern": {"((a|b)c)": 3}}, "too intricate"),
    "repeated": ({"alpha_pattern": {".*.*.*x": 3}}, "too intricate"),
    "repeated group": ({"alpha_pattern": {"(?:a+){9}": 3}}, "too intricate"),
    "reference": ({"alpha_pattern": {r"(a+)\1+": 3}}, "too intricate"),
    "look ahead": ({"alpha_pattern": {"(?=a)": 3}}, "too intricate"),
    "long": ({"alpha_pattern": {"a" * 600: 3}}, "too intricate"),
    "deep groups": ({"alpha_pattern": {"(" * 250 + ")" * 250: 3}}, "bad pattern|too intricate"),
    "huge count": ({"alpha_pattern": {"a{99999999999999999999}": 3}}, "bad pattern"),
    "patterns": ({"alpha_pattern": [1]}, "not an object"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_adapters_that_are_more_than_lora_are_refused(what, tmp_path):
    adapter("linear", tmp_path)
    change, message = REFUSED[what]
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StoreError, match=message):
        Chain.from_peft(tmp_path)


TENSORS = {
    "no factors": ({}, "holds no LoRA factors"),
    "A alone": ({"x.lora_A.weight": torch.ones(3, 2)}, "are not factors"),
    "B alone": ({"x.lora_B.weight": torch.ones(2, 3)}, "without its lora_A"),
    "shapes": ({"x.lora_A.weight": torch.ones(3, 2), "x.lora_B.weight": torch.ones(2, 2)}, "are not factors"),
    "convolution": (
        {"x.lora_A.weight": torch.ones(3, 2, 1), "x.lora_B.weight": torch.ones(2, 2, 1)},
        "are not factors",
    ),
    "integers": ({"x.lora_A.weight": torch.ones(3, 2).int(), "x.lora_B.weight": torch.ones(2, 3)}, "are not factors"),
    "embedding": ({"x.lora_embedding_A": torch.ones(3, 2)}, "are not factors"),
    "half of one": ({"x.lora_embedding_B": torch.ones(2, 3)}, "without its lora_A"),
    "magnitude": ({"x.lora_magnitude_vector": torch.ones(3)}, "not part of a plain LoRA"),
    "rank 0": ({"x.lora_A.weight": torch.ones(0, 2), "x.lora_B.weight": torch.ones(2, 0)}, "rank 0"),
    "a path": ({"../x.lora_A.weight": torch.ones(3, 2), "../x.lora_B.weight": torch.ones(2, 3)}, "refused"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_files_that_are_not_lora_are_refused(what, tmp_path):
    tensors, message = TENSORS[what]
    r = 0 if what == "rank 0" else 3
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": 1}))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    files.write(tmp_path / "adapter_model.safetensors", tensorfile.dump(named, metadata={"format": "pt"}))
    with pytest.raises(StoreError, match=message):
        Chain.from_peft(tmp_path)
