"""Links on every layer of small transformers: position tables, heads on the embedding's matrix, Falcon's linear."""

import copy

import pytest
import torch

from cola import Chain, ChainOptimizer, LinkConfig, StepKnots
from cola.lora.layer import LoRALinear
from cola.lora.reading import LinkedEmbedding
from tests.models import seeded, tiny_gpt2, tiny_opt

pytest.importorskip("transformers")

IDS = torch.arange(24).view(2, 12) * 7 % 32


def tiny_falcon():
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_hidden_size": 32,
    }
    return seeded(FalconForCausalLM, FalconConfig(**sizes, bos_token_id=1, eos_token_id=2), 0)


#: a model, its embeddings, and a layer that is none
MODELS = {
    "OPT": (tiny_opt, ["model.decoder.embed_tokens", "model.decoder.embed_positions"], "model.decoder.layers.0.fc1"),
    "GPT-2": (tiny_gpt2, ["transformer.wte", "transformer.wpe"], "transformer.h.0.attn.c_attn"),
    "Falcon": (tiny_falcon, ["transformer.word_embeddings"], "transformer.h.0.self_attention.query_key_value"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_chain_on_all_layers_holds_and_shared_weights_stay_one(name, dtype, tmp_path):
    make, tables, other = MODELS[name]
    model = make().to(dtype).eval()
    base = copy.deepcopy(model)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is table.weight
    opt = ChainOptimizer(
        torch.optim.AdamW, model, StepKnots(at=[2]), link=LinkConfig(r=(4, 2), target_modules="all"), lr=1e-2
    )
    assert [path for path, layer in opt.live.layers.items() if isinstance(layer, LinkedEmbedding)] == tables
    assert isinstance(opt.live.layers[other], LoRALinear)  # Falcon's, too: the fast one
    rows = model(input_ids=IDS).logits
    for step in range(4):
        ids = IDS.roll(step, 1)
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
        opt.zero_grad()
    with torch.no_grad():
        live = model(input_ids=IDS).logits.float()
        assert torch.equal(head.weight + 0, table.weight + 0)  # both read the matrix with the link
    opt.finish()
    with torch.no_grad():
        tied = model(input_ids=IDS).logits.float()
    # one rounding of each weight and a few of each activation, in a network of two blocks: eps times a small number
    assert (live - tied).norm() <= 16 * torch.finfo(dtype).eps * tied.norm()
    assert not torch.equal(tied, rows.float())
    assert head.weight is table.weight
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    opt.chain.save(tmp_path)
    Chain.load(tmp_path).apply(base)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    for (path, ours), theirs in zip(model.state_dict().items(), base.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), path
