"""Small chains for the probe, and dense gradients and losses for comparison."""

import copy

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, StepKnots
from theory.real_run.probe import GapProbe

STEPS, EVERY = 12, 4
# float32 sums over some hundred tokens, relative to the terms' size
CLOSE = 2e-5


def mlp(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(23, 37), nn.Tanh(), nn.Dropout(0.3), nn.Linear(37, 11))


def mlp_batches(seed=1, number=4):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 23, generator=generator), torch.randn(16, 11, generator=generator)) for _ in range(number)]


def mlp_loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def tiny_lm(kind):
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 50}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "opt":
            config = transformers.OPTConfig(
                **common,
                hidden_size=24,
                word_embed_proj_dim=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                ffn_dim=32,
                max_position_embeddings=32,
                dropout=0.1,
            )
            return transformers.OPTForCausalLM(config)
        config = transformers.GPT2Config(**common, n_embd=24, n_layer=2, n_head=2, n_positions=32)
        return transformers.GPT2LMHeadModel(config)


def lm_batches(seed=1, number=3):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(50, (4, 12), generator=generator) for _ in range(number)]
    return [{"input_ids": x, "labels": x} for x in ids]


def lm_loss(model, batch):
    return model(**batch).loss


MODELS = {
    "mlp": (mlp, mlp_batches, mlp_loss, "all-linear"),
    "opt": (lambda: tiny_lm("opt"), lm_batches, lm_loss, None),
    "gpt2": (lambda: tiny_lm("gpt2"), lm_batches, lm_loss, ["c_proj"]),
}


def train(name, probed=True, steps=STEPS, **options):
    """Train a chain of three links with a probe; returns the model, its untouched copy, the optimizer and the probe."""
    build, batches, loss, targets = MODELS[name]
    model = build()
    plain = copy.deepcopy(model)
    link = LinkConfig(r=2, lora_alpha=4, target_modules=targets)
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=EVERY), link=link, lr=2e-2)
    probe = GapProbe(model, opt, batches(), loss, **options) if probed else None
    data = batches(seed=2)
    model.train()
    torch.manual_seed(5)
    for step in range(steps):
        loss(model, data[step % len(data)]).backward()
        opt.step()
        opt.zero_grad()
    if not opt.live.is_zero():
        opt.tie()
    opt.finish()
    return model, plain, opt, probe


def dense(plain, chain, t, batches, loss):
    """Loss and dense float64 gradients (out x in) at W_t, the untouched copy plus the first t links."""
    model = copy.deepcopy(plain).eval()
    weights = {}
    for path in chain[0].factors:
        module = model.get_submodule(path)
        delta = sum((link.factors[path].delta() for link in list(chain)[:t]), torch.zeros(()))
        with torch.no_grad():
            module.weight += (delta if isinstance(module, nn.Linear) or t == 0 else delta.T).to(module.weight)
        weights[path] = module
    total = 0.0
    for batch in batches:
        value = loss(model, batch) / len(batches)
        value.backward()
        total += float(value.detach())
    grads = {path: m.weight.grad.double() for path, m in weights.items()}
    return total, {p: g if isinstance(weights[p], nn.Linear) else g.T for p, g in grads.items()}


def so_far(chain, t, path):
    return sum((link.factors[path].delta() for link in list(chain)[:t]), torch.zeros(()).double())
