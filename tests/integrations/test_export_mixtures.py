"""Chains on mixtures of experts leave as adapters that PEFT loads right, although it renames some of their layers."""

import json
from dataclasses import replace

import pytest
import torch

from cola import Chain, ChainOptimizer, Factor, KnotReport, Link, LinkConfig, StepKnots
from cola.chain.architecture import Architecture
from cola.chain.fingerprint import Fingerprint, LayerPrint
from cola.chain.peft_targets import _FUSED
from tests.models import seeded

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(24).view(2, 12) * 7 % 99

#: of whatever a mixture's config has; the first layer is dense where that can be
SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "first_k_dense_replace": 1,
    "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "num_shared_experts": 1,
    "n_shared_experts": 1, "moe_num_shared_experts": 1, "shared_expert_intermediate_size": 32, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_dense_layers": 1,
    "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "moe_layer_start_index": 1, "index_n_heads": 2,
    "index_head_dim": 16, "index_topk": 4, "zero_expert_num": 0, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip
#: model types whose dense layers PEFT renames; True where the model has such layers
MIXTURES = {
    "deepseek_v3": True, "glm4_moe": True, "mixtral": False, "qwen2_moe": False, "qwen3_next": True,
    "afmoe": True, "beam": True, "cohere2_moe": True, "deepseek_v2": True, "deepseek_v32": True, "dots1": True,
    "ernie4_5_moe": True, "exaone_moe": True, "flex_olmo": False, "glm4_moe_lite": True, "glm_moe_dsa": True,
    "hunyuan_v1_moe": True, "longcat_flash": True, "mellum": False, "minimax": False, "minimax_m2": False,
    "olmoe": False, "qwen3_moe": False, "solar_open": True,
}  # fmt: skip
QUICK = ("deepseek_v3", "glm4_moe", "mixtral", "qwen2_moe")


def mixture(model_type, seed=0):
    kind = transformers.CONFIG_MAPPING[model_type]
    config = kind(**{key: value for key, value in SIZES.items() if hasattr(kind(), key)})
    return seeded(transformers.AutoModelForCausalLM._model_mapping[kind], config, seed).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.long) for k in MIXTURES])
def test_peft_loads_the_chain_of_a_mixture(kind, tmp_path):
    model = mixture(kind)
    link = LinkConfig(r=2, target_modules="all-linear")
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=link, lr=1e-2)
    for step in range(4):
        model(input_ids=IDS.roll(step, 1), labels=IDS.roll(step, 1)).loss.backward()
        opt.step()
        opt.zero_grad()
    opt.finish()
    Chain.load(saved(opt.chain, tmp_path / "chain")).to_peft(tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(mixture(kind), tmp_path / "adapter")
    assert (logits(adapted) - logits(model)).abs().max() <= 1e-4
    assert (logits(mixture(kind)) - logits(model)).abs().max() > 1e-2, "training changed nothing"
    renamed = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_parameters"]
    assert bool(renamed) == MIXTURES[kind]
    back = Chain.from_peft(tmp_path / "adapter")
    fresh = mixture(kind)
    back.apply(fresh)
    assert (logits(fresh) - logits(model)).abs().max() <= 1e-4


def saved(chain, directory):
    chain.save(directory)
    return directory


def test_the_table_is_pefts():
    """Each model type that PEFT renames layers of, and no other."""
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    mapping, known = conversion._MOE_TARGET_MODULE_MAPPING, conversion._MODEL_TO_CONVERSION_PATTERN
    theirs = {kind: tuple(mapping[pattern]) for kind, pattern in known.items() if pattern in mapping}
    assert {kind: set(names) for kind, names in theirs.items()} == {k: set(names) for k, names in _FUSED.items()}


#: a layer of each model type whose keys PEFT renames, and one that it leaves alone
RENAMED = {
    "laguna": ("model.layers.1.mlp.shared_experts.up_proj", "model.layers.0.mlp.up_proj"),
    "mistral_large4_text": ("layers.1.mlp.shared_experts.up_proj", "layers.0.mlp.up_proj"),
    "inkling2_text": ("model.layers.5.self_attn.k_sconv.weight_proj", "model.layers.5.self_attn.k_proj"),
    "maskformer": (
        "model.pixel_level_module.encoder.model.encoder.layers.0.blocks.0.attention.output.dense",
        "model.transformer_module.decoder.layers.0.mlp.fc1",
    ),
    "pi0": ("embed_action_time.state_proj", "action_out_proj"),
    "unlimited_ocr": ("model.language_model.layers.0.self_attn.q_proj", "model.multi_modal_projector"),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_a_layer_whose_keys_peft_renames_is_refused(kind, tmp_path):
    lost, kept = RENAMED[kind]
    for path in (lost, kept):
        base = Fingerprint({path: LayerPrint((4, 4), "float32", False, None)}, None, {}, Architecture("X", "x", kind))
        factor = Factor(torch.randn(2, 4), torch.randn(4, 2), 1.0, "nearest")
        link = Link(0, 0, {path: factor}, {}, KnotReport(0, 1, 2, 1.0, 0.0, None, 0.0))
        if path == kept:
            Chain([link], base=base).to_peft(tmp_path / "kept")
            continue
        with pytest.raises(ValueError, match=f"PEFT loads a {kind} model's layer '{lost}' under another name"):
            Chain([link], base=base).to_peft(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_peft_does_rename_them():
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    for kind in ("laguna", "mistral_large4_text"):
        config = transformers.CONFIG_MAPPING[kind](num_hidden_layers=1)
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
        prefix = "base_model.model."
        for path, kept in zip(RENAMED[kind], (False, True), strict=True):
            key = f"{prefix}{path}.lora_A.weight"
            converted = conversion.convert_peft_adapter_state_dict_for_transformers(
                model, peft.LoraConfig(), {key: torch.zeros(1)}
            )
            assert (key in converted) == kept


def test_a_mixture_whose_layers_peft_cannot_tell_apart_is_refused(tmp_path):
    """Layers of one name, of which some are adapted: in a mixture an expression would be reduced to that name."""
    base = mixture("deepseek_v3")
    base.extra = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([])})})
    base.extra.model.layers.append(torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict()}))
    base.extra.model.layers[0].self_attn["o_proj"] = torch.nn.Linear(32, 32)
    link = LinkConfig(r=2, target_modules=r"model\.layers\.0\.self_attn\.o_proj")
    opt = ChainOptimizer(torch.optim.AdamW, base, StepKnots(every=1), link=link, lr=1e-2)
    base(input_ids=IDS, labels=IDS).loss.backward()
    opt.step()
    opt.finish()
    with pytest.raises(ValueError, match=r"cannot tell .* from 'extra\.model\.layers\.0\.self_attn\.o_proj'"):
        opt.chain.to_peft(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_chain_that_does_not_know_its_model_goes_by_its_experts(tmp_path):
    """A chain of an earlier format: the base's tensors show that it is a mixture."""
    base = mixture("deepseek_v3")
    path = "model.layers.0.mlp.down_proj"
    opt = ChainOptimizer(
        torch.optim.AdamW, base, StepKnots(every=9), link=LinkConfig(r=2, target_modules=[path]), lr=1e-2
    )
    base(input_ids=IDS, labels=IDS).loss.backward()
    opt.step()
    opt.finish()
    chain = Chain(list(opt.chain), base=replace(opt.chain.base, architecture=None))
    chain.to_peft(tmp_path)
    adapted = peft.PeftModel.from_pretrained(mixture("deepseek_v3"), tmp_path)
    assert (logits(adapted) - logits(base)).abs().max() <= 1e-4


def test_a_quantised_layer_that_peft_would_rename_is_refused(tmp_path):
    path = "model.layers.0.mlp.up_proj"
    built = Architecture("DeepseekV3ForCausalLM", "transformers", "deepseek_v3", "CAUSAL_LM")
    base = Fingerprint({path: LayerPrint((64, 1), "uint8", False, None)}, None, {}, built)
    factor = Factor(torch.randn(2, 4), torch.randn(4, 2), 1.0, "stack")
    link = Link(0, 0, {path: factor}, {}, KnotReport(0, 1, 2, 1.0, 0.0, None, 0.0))
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.mlp.up_proj' of this mixture .* uint8 weight"):
        Chain([link], base=base).to_peft(tmp_path / "x")
    assert not (tmp_path / "x").exists()
