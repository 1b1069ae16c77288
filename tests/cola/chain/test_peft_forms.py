"""Chains on experts, embeddings, convolutions and attention as adapters in PEFT's format, with the real PEFT."""

import copy
import dataclasses
import json

import peft
import pytest
import torch
import transformers
from torch import nn

from cola import Chain, ChainOptimizer, EvenKnots, LinkConfig, NeverKnots
from cola.chain.files import StoreError
from tests.kinds import Scaled
from tests.models import seeded, tiny_gpt2, tiny_opt

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 20,
    "num_experts_per_tok": 2,
}
DEEPSEEK = {
    "n_routed_experts": 3,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 0,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


class Convolved(nn.Module):
    """Convolutions in two and one dimensions, attention, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.patches, self.mix = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv1d(8, 8, 3)
        self.attn, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 4)

    def forward(self, x):
        x = self.mix(self.patches(x).relu().flatten(2)).permute(2, 0, 1)
        return self.out(self.attn(x, x, x)[0].mean(0))


def of(name, **changes):
    config = getattr(transformers, f"{name}Config")
    return seeded(getattr(transformers, f"{name}ForCausalLM"), config(**{**SIZES, **changes}), 0)


def convolved():
    torch.manual_seed(0)
    return Convolved()


class Loose(nn.Module):
    """Parameters of the model itself, and in a list."""

    def __init__(self):
        super().__init__()
        self.mix, self.maps = nn.Parameter(torch.ones(4, 4)), nn.ParameterList([torch.ones(4, 4)])

    def forward(self, x):
        return x @ self.mix @ self.maps[0]


#: model, options, and what the adapter names
MODELS = {
    "Mixtral": (
        lambda: of("Mixtral", num_local_experts=3),
        {},
        ["experts.gate_up_proj", "experts.down_proj"],
    ),
    "Mixtral, a head that shares the embedding": (
        lambda: of("Mixtral", num_local_experts=3, tie_word_embeddings=True),
        {},
        ["experts.gate_up_proj", "experts.down_proj"],
    ),
    "one parameter": (
        lambda: of("Mixtral", num_local_experts=3),
        {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]},
        ["experts.down_proj"],
    ),
    "parameters alone": (
        lambda: of("Mixtral", num_local_experts=3),
        {"target_modules": [], "target_parameters": ["down_proj", "gate_up_proj"]},
        ["experts.gate_up_proj", "experts.down_proj"],
    ),
    "GPT-OSS": (
        lambda: of("GptOss", num_local_experts=3, head_dim=8),
        {},
        ["experts.gate_up_proj", "experts.down_proj"],
    ),
    "Qwen3-MoE": (
        lambda: of("Qwen3Moe", num_experts=3, moe_intermediate_size=8, head_dim=8),
        {},
        ["experts.gate_up_proj", "experts.down_proj"],
    ),
    "DeepSeek-V3": (lambda: of("DeepseekV3", **DEEPSEEK), {}, None),
    "OPT": (tiny_opt, {"exclude_modules": ["embed_positions"]}, []),
    "GPT-2": (tiny_gpt2, {"exclude_modules": ["wte"]}, []),
    "convolutions and attention": (convolved, {"exclude_modules": ["out_proj"]}, []),
}


def inputs(model):
    if isinstance(model, Convolved):
        return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return torch.arange(14).reshape(2, 7)


def outputs(model):
    found = model(inputs(model.get_base_model() if isinstance(model, peft.PeftModel) else model))
    return found if isinstance(found, torch.Tensor) else found.logits


def trained(make, options, links=2):
    """The untouched base, and the run after ``links`` links."""
    base = make().eval()
    model = copy.deepcopy(base)
    link = LinkConfig(**{"r": 2, "target_modules": "all", **options})
    opt = ChainOptimizer(torch.optim.AdamW, model, EvenKnots(links, 2 * links), link=link, lr=1e-2)
    for _ in range(2 * links):
        outputs(model).square().mean().backward()
        opt.step()
        opt.zero_grad()
    opt.finish()
    return base, model, opt.chain


@pytest.mark.parametrize("name", MODELS)
def test_an_export_loads_in_peft_and_comes_back(name, tmp_path):
    make, options, parameters = MODELS[name]
    base, model, chain = trained(make, options)
    chain.to_peft(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert parameters is None or (config["target_parameters"] or []) == parameters
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    moved = (outputs(model) - outputs(base)).abs().max()
    assert moved > 1e-3
    assert (outputs(loaded) - outputs(model)).abs().max() < 1e-5
    back = Chain.from_peft(tmp_path)
    assert (outputs(back.apply(copy.deepcopy(base))) - outputs(model)).abs().max() < 1e-5
    assert {path: f.form for path, f in back[0].factors.items()} == {p: f.form for p, f in chain[0].factors.items()}


@pytest.mark.parametrize("name", ["Mixtral", "GPT-OSS"])
def test_a_truncated_export_reports_its_error(name, tmp_path):
    _, _, chain = trained(*MODELS[name][:2], links=3)
    errors = chain.to_peft(tmp_path, r=2)
    back = Chain.from_peft(tmp_path)
    for path, error in errors.items():
        left = chain.delta(path) - back.delta(path)
        assert torch.isclose(left.norm(), torch.tensor(error, dtype=left.dtype), rtol=1e-4, atol=1e-6)


LOOSE = {"target_modules": []}
REFUSED = {
    "position table": (tiny_opt, {}, "embed_positions', because PEFT looks up the layer's inputs"),
    "head of another name": (tiny_gpt2, {}, "'transformer.wte', which shares its weight with 'lm_head'"),
    "output projection": (convolved, {}, "output projection twice"),
    "forward of its own": (lambda: nn.Sequential(Scaled(3, 3)), {}, "the layer's own forward may do something else"),
    "parameter of the model": (Loose, LOOSE | {"target_parameters": ["mix"]}, "a parameter of the model itself"),
    "parameter in a list": (Loose, LOOSE | {"target_parameters": ["maps.0"]}, "a wrapped list has no items"),
    "groups": (lambda: nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Flatten()), {"r": 1}, "without its groups"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_peft_cannot_hold_is_refused_in_words(what, tmp_path):
    make, options, message = REFUSED[what]
    base = make().eval()
    link = LinkConfig(**{"r": 2, "target_modules": "all", **options})
    opt = ChainOptimizer(torch.optim.SGD, base, NeverKnots(), link=link, lr=0.1)
    opt.tie()
    with pytest.raises(ValueError, match=message):
        opt.chain.to_peft(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_kernel_of_unknown_size_is_not_exported(tmp_path):
    _, _, chain = trained(convolved, {"target_modules": ["patches"]})
    chain.to_peft(tmp_path)
    with pytest.raises(ValueError, match="the size of its kernel is not known"):
        Chain.from_peft(tmp_path).to_peft(tmp_path / "again")


def test_an_adapter_whose_experts_cannot_be_told_apart_is_refused(tmp_path):
    _, _, chain = trained(*MODELS["Mixtral"][:2])
    chain.to_peft(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for names, message in (
        (["experts.one", "experts.other"], "whose order the file does not tell"),
        (["experts.down_proj"], "wraps more parameters"),
        ([], "says otherwise"),
    ):
        path.write_text(json.dumps({**config, "target_parameters": names}))
        with pytest.raises(StoreError, match=message):
            Chain.from_peft(tmp_path)


def test_a_chain_without_its_base_is_exported_by_its_forms(tmp_path):
    """An adapter that was read knows no base model."""
    base, model, chain = trained(*MODELS["GPT-OSS"][:2])
    chain.to_peft(tmp_path)
    Chain.from_peft(tmp_path).to_peft(tmp_path / "again")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    assert (outputs(loaded) - outputs(model)).abs().max() < 1e-5


def test_the_form_survives_saving(tmp_path):
    _, _, chain = trained(*MODELS["Mixtral"][:2])
    chain.save(tmp_path)
    loaded = Chain.load(tmp_path)
    assert [f.form for f in loaded[0].factors.values()] == [f.form for f in chain[0].factors.values()]
    assert loaded.base == chain.base
    assert dataclasses.asdict(loaded.base.architecture) == dataclasses.asdict(chain.base.architecture)
