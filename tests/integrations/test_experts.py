"""Links on the fused experts of transformers' mixtures, in each of its ways to compute them."""

import copy

import pytest
import torch

from cola import Chain, ChainOptimizer, KnotError, LinkConfig, StepKnots
from cola.lora import targets
from cola.lora.coverage import coverage
from cola.lora.linked_weight import LinkedWeight
from tests.models import seeded

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "GptOssConfig"):
    pytest.skip("this version has no fused experts", allow_module_level=True)

IDS = torch.arange(24).view(2, 12) * 7 % 99
SMALL = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "use_cache": False, "pad_token_id": 0,
}  # fmt: skip
#: of each mixture, the sizes of its own
MIXTURES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "DeepseekV3": {
        "n_routed_experts": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "GptOss": {"num_local_experts": 4},
}  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
WAYS = ("eager", "batched_mm", "grouped_mm")


def mixture(name, way="eager", dtype=torch.float32):
    config = getattr(transformers, f"{name}Config")(**SMALL, **MIXTURES[name])
    config._experts_implementation = way
    return seeded(getattr(transformers, f"{name}ForCausalLM"), config, 0).to(dtype).eval()


def chained(model, **link):
    link = {"r": (4, 2), "target_modules": "all", **link}
    return ChainOptimizer(torch.optim.AdamW, model, StepKnots(at=[2]), link=LinkConfig(**link), lr=1e-2)


def train(opt, model, steps, start=0):
    for step in range(start, start + steps):
        opt.zero_grad()
        ids = IDS.roll(step, 1)
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("way", WAYS)
def test_a_chain_holds_on_experts(name, way, tmp_path, monkeypatch):
    model = mixture(name, way)
    base = copy.deepcopy(model)
    opt = chained(model)
    experts = [path for path in opt.live.layers if path.endswith((".experts.gate_up_proj", ".experts.down_proj"))]
    assert len(experts) == (2 if name == "DeepseekV3" else 4)
    with monkeypatch.context() as patch:

        def never(weight):
            raise AssertionError("the sum of weights and link was formed")

        patch.setattr(LinkedWeight, "summed", never)
        train(opt, model, 2)
        opt.save(tmp_path / "run")
        train(opt, model, 2, 2)
        live = logits(model)
    assert opt.live.rank == 2
    opt.finish()
    # fp32 rounds each of some thousand sums in two layers, which random signs leave at about their root
    assert (logits(model) - live).abs().max() <= 2**6 * torch.finfo(torch.float32).eps * live.abs().max()
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    again = mixture(name, way)
    second = chained(again)
    second.load(tmp_path / "run")
    train(second, again, 2, 2)
    second.finish()
    opt.chain.save(tmp_path / "chain")
    Chain.load(tmp_path / "chain").apply(base)
    for other in (again, base):
        for (path, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), path
    moved = model.get_parameter(experts[0]) - mixture(name).get_parameter(experts[0])
    assert torch.linalg.matrix_rank(moved).max() <= 6


@pytest.mark.parametrize("name", MIXTURES)
def test_all_ways_to_compute_experts_agree_in_outputs_and_gradients(name):
    found = []
    for way in WAYS:
        model = mixture(name, way)
        opt = chained(model, init="two-sided", target_modules=[], target_parameters=EXPERTS)
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([logits(model), *(p.grad.clone() for p in opt.live.adapters())])
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            assert (ours - theirs).norm() <= 2**7 * torch.finfo(torch.float32).eps * ours.norm()


@pytest.mark.parametrize("way", WAYS)
def test_experts_in_half_precision(way):
    model = mixture("Mixtral", way, torch.bfloat16)
    opt = chained(model)
    train(opt, model, 3)
    live = logits(model).float()
    opt.finish()
    assert (logits(model).float() - live).abs().max() <= 2**4 * torch.finfo(torch.bfloat16).eps * live.abs().max()


#: published sizes, of which a few layers count: their shares do not depend on the number
PUBLISHED = {
    "Mixtral-8x7B": ("Mixtral", {}, 1),
    "Qwen3-30B-A3B": ("Qwen3Moe", {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936, "num_hidden_layers": 48,
    }, 1),
    "DeepSeek-V3": ("DeepseekV3", {}, 4),
    "GPT-OSS-20B": ("GptOss", {"num_local_experts": 32, "num_hidden_layers": 24}, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_reaches_95_percent_of_published_mixtures(name, monkeypatch):
    """Counted on the meta device with one layer of each kind, times the number of layers in the published model."""
    real = targets.obstacles
    monkeypatch.setattr(  # there no weight could be tied
        targets, "obstacles", lambda *a: {path: why for path, why in real(*a).items() if why != targets._META}
    )
    kind, sizes, first = PUBLISHED[name]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    layers = config.num_hidden_layers
    counts = []
    for number in (first, first + 1):  # the last is one more of the layers with experts
        config.num_hidden_layers = number
        with torch.device("meta"):
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
        found = (coverage(model, targets.find_targets(model, wanted)) for wanted in targets.WHOLE)
        counts.append([(one.parameters, one.total) for one in found])
    shares = []
    for (few, total), (more, larger) in zip(*counts, strict=True):
        extra = layers - first
        shares.append((few + extra * (more - few)) / (total + extra * (larger - total)))
    linear, every = shares
    assert linear < 0.04
    assert every >= 0.95


def test_experts_that_were_replaced_are_named():
    model = mixture("Mixtral")
    opt = chained(model)
    model.model.layers[1].mlp.experts = copy.deepcopy(model.model.layers[1].mlp.experts)
    with pytest.raises(KnotError, match=r"layers\.1\.mlp\.experts\.gate_up_proj' now belongs to another module"):
        opt.tie()
