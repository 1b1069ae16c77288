"""The adapters' FLOPs per token and rank: the formula on small decoders, the paper's models, our own layer."""

import doctest

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")

import transformers

from cola import ChainOptimizer, LinkConfig, NeverKnots
from experiments.paper import flops
from experiments.paper.flops import per_token_and_rank


def opt(width=16, layers=2, inner=24, **more):
    return transformers.OPTConfig(
        hidden_size=width, num_hidden_layers=layers, ffn_dim=inner, num_attention_heads=2, word_embed_proj_dim=width,
        vocab_size=51, max_position_embeddings=32, **more,
    )  # fmt: skip


def llama(kind=transformers.LlamaConfig, **more):
    return kind(
        hidden_size=16, num_hidden_layers=2, intermediate_size=20, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=51, max_position_embeddings=32, **more,
    )  # fmt: skip


def linear(inner, out, needed=True):
    """The formula for one layer; `needed`: its input needs a gradient."""
    return 6 * (inner + out) - (0 if needed else 2 * inner)


def two_blocks(*layers):
    """Two blocks alike, except that the first one's layers are on inputs without a gradient."""
    return sum(linear(*layer, needed) for layer in layers for needed in (False, True))


@pytest.mark.parametrize(
    "config, targets, expected",
    [
        (opt(), ("q_proj", "v_proj"), two_blocks((16, 16), (16, 16))),
        (opt(), ("self_attn.k_proj",), two_blocks((16, 16))),
        (opt(), ("fc2",), two_blocks((24, 16))),
        (opt(), ("v_proj", "out_proj"), two_blocks((16, 16)) + 2 * linear(16, 16)),
        (llama(), ("q_proj", "v_proj"), two_blocks((16, 16), (16, 8))),
        (llama(transformers.MistralConfig), ("q_proj",), two_blocks((16, 16))),
        (llama(transformers.Qwen2Config), ("gate_proj", "up_proj"), two_blocks((16, 20), (16, 20))),
        # OPT-1.3B and Llama-2-7B
        (transformers.OPTConfig(hidden_size=2048, num_hidden_layers=24, ffn_dim=8192, num_attention_heads=32,
                                word_embed_proj_dim=2048), ("q_proj", "v_proj"), 1_171_456),
        pytest.param(transformers.LlamaConfig(), ("q_proj", "v_proj"), 3_129_344, marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_the_count_is_the_formula(config, targets, expected):
    assert per_token_and_rank(config, targets) == expected


def test_our_layer_does_these_products():
    """Torch's counter has no formula for products added in place, which our layer uses."""
    counted = []
    for rank in (1, 5):
        model = transformers.AutoModelForCausalLM.from_config(opt(), attn_implementation="eager")
        link = LinkConfig(r=rank, target_modules=list(flops.QUERY_AND_VALUE), bias="lora_only")
        ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=link, lr=0.1)
        in_place = {torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1]}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            model(input_ids=torch.zeros(2, 7, dtype=torch.long), use_cache=False).logits.sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[1] - counted[0] == (5 - 1) * 2 * 7 * per_token_and_rank(opt())


@pytest.mark.parametrize("targets", [(), ("up_proj",), ("proj",)])
def test_targets_that_the_model_lacks_are_named(targets):
    with pytest.raises(ValueError, match=r"targets=\(.*'opt'"):
        per_token_and_rank(opt(), targets)


def test_the_docstrings_number():
    assert doctest.testmod(flops).failed == 0
