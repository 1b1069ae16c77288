"""Which layers get links by default and by "all-linear" on the models people have, and what is said of the rest."""

import logging

import pytest
import torch

from cola import ChainOptimizer, LinkConfig, NeverKnots
from tests.models import seeded

T = pytest.importorskip("transformers")

from tests.breadth.tiny import tiny_config  # noqa: E402 (needs transformers)


def model(name, **changes):
    kind = getattr(T, name)
    config = tiny_config(kind.config_class)
    for key, value in changes.items():
        setattr(config, key, value)
    return seeded(kind, config, 0)


def chained(model, targets=None, **link):
    return ChainOptimizer(
        torch.optim.SGD, model, NeverKnots(), link=LinkConfig(r=2, target_modules=targets, **link), lr=0.1
    )


def ends(opt):
    return {path.rsplit(".", 1)[-1] for path in opt.live.layers}


DEFAULTS = {
    "LlamaForCausalLM": {"q_proj", "v_proj"},
    "DeepseekV3ForCausalLM": {"q_b_proj", "kv_b_proj"},
    "FalconForCausalLM": {"query_key_value"},
    "CTRLLMHeadModel": {"Wq", "Wv"},
    "RwkvForCausalLM": {"receptance", "value"},
    "Wav2Vec2ConformerForCTC": {"linear_q", "linear_v"},
    "DebertaForMaskedLM": {"in_proj"},
    "CpmAntForCausalLM": {"project_q", "project_v"},
    "FunnelForMaskedLM": {"q_head", "v_head"},
    "Qwen3NextForCausalLM": {"q_proj", "v_proj", "in_proj_qkvz"},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_targets(name):
    assert ends(chained(model(name))) == DEFAULTS[name]


def test_deepseek_without_a_low_rank_query():
    kind = T.DeepseekV2ForCausalLM
    config = tiny_config(kind.config_class)
    config.q_lora_rank = None
    assert ends(chained(seeded(kind, config, 0))) == {"q_proj", "kv_b_proj"}


def test_falcons_own_linear_layer_carries_links():
    base = model("FalconForCausalLM").eval()
    opt = chained(base, "all-linear")
    assert ends(opt) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    ids = torch.arange(12).view(2, 6) + 3
    base(ids).logits.square().mean().backward()
    opt.step()
    with torch.no_grad():
        before = base(ids).logits
        opt.finish()
        # W x + sBA x and (W + sBA) x in fp32, through two layers of width 32
        assert torch.allclose(base(ids).logits, before, atol=1e-5)
    assert type(base.transformer.h[0].mlp.dense_h_to_4h).__name__ == "FalconLinear"


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"])
def test_a_vision_tower_is_left_out_by_default_with_a_word(name, caplog):
    opt = chained(model(name))
    assert all("language_model" in path for path in opt.live.layers)
    assert "puts links on the language model alone and leaves out" in caplog.text
    assert "vis" in caplog.text
    (tower,) = [one for one in opt.coverage().left_out if one.group == "vision tower"]
    assert tower.parameters > 0
    opt.finish()
    assert any("vis" in path for path in chained(model(name), "all-linear").live.layers)


@pytest.mark.parametrize("name", ["CLIPModel", "AltCLIPModel", "SiglipModel"])
def test_both_parts_of_a_dual_encoder_get_links(name, caplog):
    layers = chained(model(name)).live.layers
    assert any("text" in path for path in layers)
    assert any("vision" in path for path in layers)
    assert "leaves out" not in caplog.text


HEADS = {
    "BertForSequenceClassification": "classifier",
    "LlamaForSequenceClassification": "score",
    "BertForQuestionAnswering": "qa_outputs",
    "RobertaForTokenClassification": "classifier",
    "BartForSequenceClassification": "classification_head",
    "ViTForImageClassification": "classifier",
    "Wav2Vec2ForCTC": "lm_head",
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_a_head_that_stays_frozen_is_named_once(name, targets, caplog):
    opt = chained(model(name), targets)
    assert not [path for path in opt.live.layers if path.split(".")[0] == HEADS[name]]
    assert caplog.text.count("stays frozen") == 1
    assert f"modules_to_save=['{HEADS[name]}']" in caplog.text
    opt.finish()
    caplog.clear()
    chained(model(name), targets, modules_to_save=[HEADS[name]])
    assert "stays frozen" not in caplog.text


def test_several_frozen_heads_are_named_together(caplog):
    chained(model("Wav2Vec2ForSequenceClassification"), None)
    assert "the heads 'projector' and 'classifier' of Wav2Vec2ForSequenceClassification stay frozen" in caplog.text


def test_a_head_that_peft_copies_counts_once(caplog):
    """PEFT keeps the head that its trained copy stands in for, which is no part of the model any more."""
    peft = pytest.importorskip("peft")
    plain = model("BertForSequenceClassification")
    total, head = (sum(p.numel() for p in m.parameters()) for m in (plain, plain.classifier))
    tuned = peft.get_peft_model(plain, peft.LoraConfig(task_type="SEQ_CLS", r=2))
    found = ChainOptimizer(torch.optim.SGD, tuned, NeverKnots(), lr=0.1).coverage()
    assert (found.total, found.trained) == (total, head)
    assert found.parameters + found.trained + sum(one.parameters for one in found.left_out) == total
    assert "output head" not in {one.group for one in found.left_out}
    assert "frozen" not in caplog.text


def test_language_models_have_no_head_to_train(caplog):
    opt = chained(model("LlamaForCausalLM"), "all-linear")
    assert "lm_head" not in ends(opt)
    assert "frozen" not in caplog.text
    assert {one.group for one in opt.coverage().left_out} >= {"output head", "embeddings", "norms and biases"}


def test_fused_experts_are_reported_with_their_share(caplog):
    mixture = model("MixtralForCausalLM")
    with caplog.at_level(logging.INFO, "cola"):
        opt = chained(mixture, "all-linear")
    found = opt.coverage()
    (experts,) = [one for one in found.left_out if one.group == "fused experts"]
    own = sum(p.numel() for n, p in mixture.named_parameters() if ".experts." in n)
    assert experts.parameters == own
    assert found.total == sum(p.numel() for n, p in mixture.named_parameters() if "lora_" not in n)
    assert found.share < 0.5
    assert "reaches less than half of the model" in caplog.text
    assert "fused experts" in caplog.text
    assert len([r for r in caplog.records if r.levelno == logging.INFO and "with links" in r.getMessage()]) == 1


def test_shared_layers_are_left_out_and_refused_by_name(caplog):
    zamba = model("Zamba2ForCausalLM")
    opt = chained(zamba, "all-linear")
    assert not [path for path in opt.live.layers if "shared_transformer.self_attn" in path]
    assert "is tied (" in caplog.text
    assert "shared weights" in {one.group for one in opt.coverage().left_out}
    opt.finish()
    with pytest.raises(ValueError, match=r"the weight of '.*q_proj' is tied \("):
        chained(zamba, ["q_proj"])
    with pytest.raises(ValueError, match=r"no linear layer that can carry a link: .*q_proj.* is tied"):
        chained(zamba)


def test_luke_keeps_all_but_its_tied_decoder():
    opt = chained(model("LukeForMaskedLM"), "all-linear")
    assert "entity_predictions.decoder" not in opt.live.layers
    assert len(opt.live.layers) > 10
    opt.finish()


@pytest.mark.parametrize("name", ["WavLMForCTC", "MambaForCausalLM", "MobileBertForMaskedLM"])
def test_layers_whose_weights_the_model_reads_are_left_out(name, caplog):
    opt = chained(model(name), "all-linear")
    assert "reads the weight without calling the layer" in caplog.text
    assert not [p for p in opt.live.layers if p.endswith(("self_attn.q_proj", "attention.q_proj", "dt_proj"))]
    opt.finish()
    if name == "WavLMForCTC":
        with pytest.raises(ValueError, match="belongs to a WavLMAttention, whose forward reads the weight"):
            chained(model(name), ["q_proj"])
