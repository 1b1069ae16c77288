"""Small models for the tests, made from explicit seeds."""

import torch
from torch import Tensor, nn

from cola.lora.config import LayerPlan


class Net(nn.Module):
    """Two linear layers, a bias-free one and a head: what a chain must cope with in five lines."""

    def __init__(self, d: int = 6, out: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(d, d)
        self.second = nn.Linear(d, d, bias=False)
        self.head = nn.Linear(d, out)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / d**0.5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


BODY = ["first", "second"]


def batch(step: int, d: int = 6, out: int = 3, n: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The inputs of one step, and their targets from one fixed teacher."""
    teacher = torch.randn(d, out, generator=torch.Generator().manual_seed(7))
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(1000 + step))
    return x.to(dtype), torch.tanh(x @ teacher).to(dtype)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean squared error of one step's batch."""
    x, y = batch(step, dtype=dtype)
    return (model(x) - y).square().mean()


def train(opt, model: nn.Module, steps: int, start: int = 0, dtype: torch.dtype = torch.float32) -> list[float]:
    """A plain loop; returns the losses."""
    losses = []
    for step in range(start, start + steps):
        opt.zero_grad()
        loss = loss_of(model, step, dtype)
        loss.backward()
        if hasattr(opt, "observe"):
            opt.observe(loss)
        opt.step()
        losses.append(loss.item())
    return losses


def closure_steps(opt, model: nn.Module, steps: int, start: int = 0) -> list[float]:
    """Steps with a closure, which every base takes, LBFGS included; returns what they return."""
    losses = []
    for step in range(start, start + steps):

        def closure(step=step):
            opt.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        losses.append(opt.step(closure).item())
    return losses


def tiny_opt(seed: int = 0, **changes):
    """A random OPT with untied head."""
    from transformers import OPTConfig, OPTForCausalLM

    config = {
        "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32,
        "max_position_embeddings": 32, "word_embed_proj_dim": 16, "dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        **changes,
    }  # fmt: skip
    return seeded(OPTForCausalLM, OPTConfig(**config), seed)


def tiny_gpt2(seed: int = 0, **changes):
    """A random GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = {
        "vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2, **changes,
    }  # fmt: skip
    return seeded(GPT2LMHeadModel, GPT2Config(**config), seed)


def tiny_mixtral(seed: int = 0, **changes):
    """A random Mixtral of one layer, whose file on disk has its experts one by one."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_local_experts": 3, **changes,
    }  # fmt: skip
    return seeded(MixtralForCausalLM, MixtralConfig(**config), seed)


def seeded(kind, config, seed: int):
    """A model whose weights follow from ``seed``; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)


def draw(config, shape, *, seed, link, layer):
    """The factors that a link of a layer starts from."""
    return LayerPlan(config).draw(layer, shape, seed=seed, link=link)
