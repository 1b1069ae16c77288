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
    return _opt(48, 2, 3, 300) if smoke else _opt(768, 12, 12, 50272)


def opt_1_3b(smoke: bool) -> nn.Module:
    """Four of OPT-1.3B's 24 layers of width 2,048, in bf16."""
    return (_opt(64, 2, 4, 300) if smoke else _opt(2048, 4, 32, 50272, _gpu())).to(torch.bfloat16)


def llama_like(smoke: bool) -> nn.Module:
    """A small Llama: 8 layers of width 512, grouped queries, 8,000 tokens."""
    return _llama(32, 2, 8, 4, 88, 8000) if smoke else _llama(512, 8, 8, 4, 1408, 8000)


def llama_2_7b(smoke: bool) -> nn.Module:
    """Four of Llama-2-7B's 32 layers of width 4,096, in bf16."""
    return (_llama(64, 2, 4, 4, 176, 300) if smoke else _llama(4096, 4, 32, 32, 11008, 32000, _gpu())).to(
        torch.bfloat16
    )


#: name -> (in words, model, sequences, tokens)
MODELS: Mapping[str, tuple[str, Callable[[bool], nn.Module], int, int]] = {
    "tiny-opt": ("the demo's tiny OPT", tiny, 4, 256),
    "opt-125m": ("OPT-125M's shape", opt_125m, 2, 256),
    "llama": ("Llama-like, width 512", llama_like, 4, 256),
}

#: the same, for a GPU
LARGE: Mapping[str, tuple[str, Callable[[bool], nn.Module], int, int]] = {
    "opt-1.3b": ("4 layers of OPT-1.3B's shape", opt_1_3b, 8, 256),
    "llama-2-7b": ("4 layers of Llama-2-7B's shape", llama_2_7b, 4, 256),
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


def _gpu() -> str:
    """Where a large model is made: a billion normal draws take a CPU half a minute."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _opt(width: int, layers: int, heads: int, words: int, device: str = "cpu") -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=words, hidden_size=width, word_embed_proj_dim=width, num_hidden_layers=layers, dropout=0.0,
        num_attention_heads=heads, ffn_dim=4 * width, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return _seeded(OPTForCausalLM, config, device)


def _llama(width: int, layers: int, heads: int, pairs: int, inner: int, words: int, device: str = "cpu") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=words, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=pairs, intermediate_size=inner, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return _seeded(LlamaForCausalLM, config, device)


def _seeded(kind: Any, config: Any, device: str) -> nn.Module:
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(0)
        return kind(config)
