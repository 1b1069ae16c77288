"""The models of the step and knot benchmarks: shapes of real models with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from experiments.methods import QUERY_AND_VALUE
from experiments.tiny import tiny_opt

TARGETS = list(QUERY_AND_VALUE)


def tiny(smoke: bool) -> nn.Module:
    """The offline demo's model, with its committed weights."""
    return tiny_opt.load()


def opt_125m(smoke: bool) -> nn.Module:
    """OPT-125M: 12 layers of width 768, feed-forward of 3072, 50,272 tokens."""
    from transformers import OPTConfig, OPTForCausalLM

    width, layers, words = (48, 2, 300) if smoke else (768, 12, 50272)
    config = OPTConfig(
        vocab_size=words, hidden_size=width, word_embed_proj_dim=width, num_hidden_layers=layers, dropout=0.0,
        num_attention_heads=width // 16 if smoke else 12, ffn_dim=4 * width, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    return _seeded(OPTForCausalLM, config)


def llama_like(smoke: bool) -> nn.Module:
    """A small Llama: 8 layers of width 512, grouped queries, 8,000 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers = (32, 2) if smoke else (512, 8)
    config = LlamaConfig(
        vocab_size=8000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=11 * width // 4, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return _seeded(LlamaForCausalLM, config)


#: name -> (in words, model, sequences, tokens)
MODELS: Mapping[str, tuple[str, Callable[[bool], nn.Module], int, int]] = {
    "tiny-opt": ("the demo's tiny OPT", tiny, 4, 256),
    "opt-125m": ("OPT-125M's shape", opt_125m, 2, 256),
    "llama": ("Llama-like, width 512", llama_like, 4, 256),
}


def batch(model: Any, sequences: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Random token ids."""
    return torch.randint(3, min(model.config.vocab_size, 256), (sequences, tokens), generator=generator)


def stack(layers: int, width: int, seed: int = 0) -> nn.Sequential:
    """Square linear layers without biases, for measurements that depend only on shapes."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / width**0.5)
    return model


def _seeded(kind: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config)
