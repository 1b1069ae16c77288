"""The models people have: default targets, knots, finish, save, and reload with the original class."""

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, StepKnots
from tests.models import seeded

transformers = pytest.importorskip("transformers")
T = transformers

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
IDS = torch.arange(24).view(2, 12) * 5 % 32
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def text():
    return {"input_ids": IDS, "labels": IDS}


def images():
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


MODELS = {
    "OPT": (
        T.OPTForCausalLM,
        lambda: T.OPTConfig(**TEXT, **TOKENS, ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=16),
        text, ("q_proj", "v_proj"), 4,
    ),
    "Llama": (
        T.LlamaForCausalLM,
        lambda: T.LlamaConfig(**TEXT, **TOKENS, intermediate_size=32, num_key_value_heads=1),
        text, ("q_proj", "v_proj"), 4,
    ),
    "GPT-2": (
        T.GPT2LMHeadModel,
        lambda: T.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32, **TOKENS),
        text, ("c_attn",), 2,
    ),
    "BERT": (
        T.BertForSequenceClassification,
        lambda: T.BertConfig(**TEXT, intermediate_size=32, max_position_embeddings=32),
        lambda: {"input_ids": IDS, "labels": torch.tensor([0, 1])}, ("query", "value"), 4,
    ),
    "T5": (
        T.T5ForConditionalGeneration,
        lambda: T.T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=1,
        ),
        text, ("q", "v"), 6,
    ),
    "ViT": (
        T.ViTForImageClassification,
        lambda: T.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
        ),
        images, None, 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_transformers_models(name, tmp_path):
    kind, config, inputs, names, count = MODELS[name]
    model, inputs = seeded(kind, config(), 0), inputs()
    keys = list(model.state_dict())
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(r=2), lr=0.01)
    ends = {path.rsplit(".", 1)[-1] for path in opt.live.layers}
    assert len(opt.live.layers) == count
    assert names is None or ends == set(names)
    for _ in range(5):
        opt.zero_grad()
        model(**inputs).loss.backward()
        opt.step()
    model.eval()
    with torch.no_grad():
        before = model(**inputs).logits
        opt.finish()
        # W x + sBA x and (W + sBA) x: fp32 rounding through a few layers of width 16
        assert torch.allclose(model(**inputs).logits, before, atol=1e-5)
    assert len(opt.chain) == 3
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert type(again) is kind
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)
    fresh = seeded(kind, config(), 0)
    opt.chain.apply(fresh)
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), model.parameters()))


class Small(nn.Module):
    """A convolution, which stays as it is, before linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.hidden, self.out = nn.Linear(36, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(self.conv(x).flatten(1))))


PLAIN = {
    "MLP": lambda: (nn.Sequential(nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4)), lambda x: x.flatten(1)),
    "CNN": lambda: (Small(), lambda x: x),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_models(name, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, shape = PLAIN[name]()
        fresh, _ = PLAIN[name]()
    x = shape(images()["pixel_values"])
    with pytest.raises(ValueError, match="give target_modules='all-linear' or names among"):
        ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(r=2))
    link = LinkConfig(r=2, target_modules="all-linear")
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=link, lr=0.01)
    for _ in range(5):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    before = model(x)
    opt.finish()
    assert torch.allclose(model(x), before, atol=1e-5)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(fresh(x), model(x))
