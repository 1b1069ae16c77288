"""Links of their own for the parts of fused projections: layouts of real models, ranks, ties, resume, refusals."""

import copy
import importlib
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cola import Chain, ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from cola.lora.init import INITS, LinkStart, generator
from cola.lora.parts import LAYOUTS, known_rows
from tests.models import seeded, tiny_gpt2


def _neox():
    from transformers import GPTNeoXConfig, GPTNeoXModel

    return GPTNeoXModel, GPTNeoXConfig(
        vocab_size=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


def _bloom():
    from transformers import BloomConfig, BloomModel

    return BloomModel, BloomConfig(
        vocab_size=8, hidden_size=24, n_layer=1, n_head=3, hidden_dropout=0.0, attention_dropout=0.0
    )


def _falcon(**changes):
    from transformers import FalconConfig, FalconModel

    return FalconModel, FalconConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, parallel_attn=True, **changes
    )


def _phi3():
    from transformers import Phi3Config, Phi3Model

    return Phi3Model, Phi3Config(
        vocab_size=8, hidden_size=32, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=16,
        original_max_position_embeddings=16,
    )  # fmt: skip


def _gpt2():
    from transformers import GPT2Config, GPT2Model

    return GPT2Model, GPT2Config(
        vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )


def _bigcode(multi_query):
    from transformers import GPTBigCodeConfig, GPTBigCodeModel

    return GPTBigCodeModel, GPTBigCodeConfig(
        vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        multi_query=multi_query,
    )  # fmt: skip


def _mpt():
    from transformers import MptConfig, MptModel

    return MptModel, MptConfig(vocab_size=8, d_model=16, n_heads=2, n_layers=1, max_seq_len=16)


def _persimmon():
    from transformers import PersimmonConfig, PersimmonModel

    return PersimmonModel, PersimmonConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        hidden_dropout=0.0, attention_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, qk_layernorm=False,
    )  # fmt: skip


def _dbrx():
    from transformers import DbrxConfig, DbrxModel

    return DbrxModel, DbrxConfig(
        vocab_size=8, d_model=32, n_heads=4, n_layers=1, max_seq_len=16,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        ffn_config={"ffn_hidden_size": 8, "moe_num_experts": 2, "moe_top_k": 1},
    )  # fmt: skip


def _modernbert():
    from transformers import ModernBertConfig, ModernBertModel

    return ModernBertModel, ModernBertConfig(
        vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip


#: model, end of the projection's path, end of that of the layer after the attention, rows of q, k and v
ATTENTIONS = {
    "by-head-neox": (_neox, "query_key_value", "dense", (24, 24, 24)),
    "by-head-bloom": (_bloom, "query_key_value", "self_attention.dense", (24, 24, 24)),
    "by-head-falcon": (
        lambda: _falcon(multi_query=False, new_decoder_architecture=False), "query_key_value", "self_attention.dense",
        (32, 32, 32),
    ),
    "by-group-falcon": (
        lambda: _falcon(num_kv_heads=2, new_decoder_architecture=True), "query_key_value", "self_attention.dense",
        (32, 16, 16),
    ),
    "one-key-falcon": (
        lambda: _falcon(multi_query=True, new_decoder_architecture=False), "query_key_value", "self_attention.dense",
        (32, 8, 8),
    ),
    "by-head-persimmon": (_persimmon, "query_key_value", "self_attn.dense", (16, 16, 16)),
    "grouped-phi3": (_phi3, "qkv_proj", "o_proj", (32, 16, 16)),
    "grouped-dbrx": (_dbrx, "Wqkv", "out_proj", (32, 16, 16)),
    "thirds-gpt2": (_gpt2, "c_attn", "attn.c_proj", (16, 16, 16)),
    "thirds-mpt": (_mpt, "Wqkv", "out_proj", (16, 16, 16)),
    "thirds-modernbert": (_modernbert, "Wqkv", "attn.Wo", (16, 16, 16)),
    "by-head-bigcode": (lambda: _bigcode(False), "c_attn", "attn.c_proj", (16, 16, 16)),
    "one-key-bigcode": (lambda: _bigcode(True), "c_attn", "attn.c_proj", (16, 8, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIONS)
def test_rows_are_those_that_the_attention_reads(name):
    """A query decides for its own position alone; without values the output is zero; equal ones hide the keys."""
    make, projection, after, sizes = ATTENTIONS[name]
    model = seeded(*make(), 0).eval()
    path, layer = next((p, m) for p, m in model.named_modules() if p.endswith(projection))
    owner = model.get_submodule(path.rpartition(".")[0])
    out = layer(torch.zeros(1, layer.nx if hasattr(layer, "nx") else layer.in_features)).shape[-1]
    rows = known_rows(owner, projection, out)
    assert [len(rows[part]) for part in "qkv"] == list(sizes)
    assert sorted(torch.cat([*rows.values()]).tolist()) == list(range(out))

    seen, change = [], lambda y: y
    layer.register_forward_hook(lambda module, inputs, output: change(output.clone()))
    last = next(m for p, m in model.named_modules() if p.endswith(after))
    last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().view(4, -1)))
    noise = torch.randn(out, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def read(*changes):
        nonlocal change

        def change(y):
            for part, kind in changes:
                flat = y.view(4, -1)
                mine = rows[part]
                if kind == "noise":
                    flat[1, mine] += noise[mine]
                else:
                    flat[:, mine] = flat[2, mine] if kind == "equal" else 0.0
            return y

        model(input_ids=torch.tensor([[1, 5, 3, 6]]))
        return seen.pop()

    plain, equal = read(), read(("v", "equal"))
    moved = {part: (read((part, "noise")) - plain).abs().amax(1) for part in "qkv"}
    assert (moved["q"] > 0).tolist() == [False, True, False, False]
    assert moved["k"][3] > 0
    assert moved["v"][3] > 0
    assert not read(("v", "zero")).any()
    # attention weights sum to one: four rounding errors of numbers of this size
    assert torch.allclose(read(("k", "noise"), ("v", "equal")), equal, atol=1e-5 * equal.abs().max().item())


#: folder of transformers' models -> class of the MLP
MLPS = {"phi3": "Phi3MLP", "glm": "GlmMLP", "glm4": "Glm4MLP", "glm4v": "Glm4vTextMLP", "dia": "DiaMLP"}


@pytest.mark.parametrize("folder", MLPS)
def test_rows_of_gate_and_up_are_those_that_the_mlp_reads(folder):
    """The output is linear in the up projection, and zero where the gate is; it is not linear in the gate."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config = SimpleNamespace(hidden_size=8, intermediate_size=6, hidden_act="silu")
    mlp = seeded(getattr(module, MLPS[folder]), config, 0)
    rows = known_rows(mlp, "gate_up_proj", 12)
    x, found = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), {}
    for part, factor in (("up", 1.0), ("up", 2.0), ("gate", 2.0), ("gate", 0.0)):
        copied = copy.deepcopy(mlp)
        with torch.no_grad():
            copied.gate_up_proj.weight[rows[part]] *= factor
            found[part, factor] = copied(x)
    assert torch.allclose(found["up", 2.0], 2 * found["up", 1.0])
    assert not torch.allclose(found["gate", 2.0], 2 * found["up", 1.0])
    assert not found["gate", 0.0].any()


def test_every_layout_is_tested():
    owners = {"GPTNeoX", "Bloom", "Falcon", "Persimmon", "Phi3", "Dbrx", "GPT2", "Mpt", "ModernBert", "GPTBigCode"}
    assert LAYOUTS.keys() == {*MLPS.values(), *(f"{name}Attention" for name in owners)}
    assert {name.lower().removeprefix("gpt") for name in owners} == {
        case.rpartition("-")[2].removeprefix("gpt") for case in ATTENTIONS
    }


# the link

PARTS = {"c_attn": {"q": 3, "k": 1, "v": 2}}


def tiny():
    return tiny_gpt2(n_layer=1)


def made(model, *, base=torch.optim.AdamW, reset="state", every=2, lr=1e-2, parts=PARTS, **link):
    config = LinkConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "parts": parts, **link})
    return ChainOptimizer(base, model, StepKnots(every=every), link=config, reset=reset, lr=lr)


def run(model, opt, steps, start=0):
    for step in range(start, start + steps):
        ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
        opt.zero_grad()


def fused(model):
    return model.transformer.h[0].attn.c_attn


def stray(layer):
    """Entries of B outside the parts of the link of ranks 3, 1, 2."""
    B = layer.lora_B.detach().clone()
    for rows, columns in ((range(16), range(3)), (range(16, 32), [3]), (range(32, 48), (4, 5))):
        B[[[row] for row in rows], columns] = 0
    return B


@pytest.mark.parametrize("train", ["both", "B", "A"])
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "selector"])
def test_each_part_starts_as_a_layer_of_its_rows(init, train):
    opt = made(tiny(), init=init, train=train)
    layer, (path,) = opt.live.layers["transformer.h.0.attn.c_attn"], opt.live.layers
    start = 0
    for part, rank in PARTS["c_attn"].items():
        shape = (16, 16)
        alone = LinkStart(path, shape, rank, 2.0, 0, generator(0, 0, f"{path}:{part}"))
        drawn = INITS[init](alone)
        rows = slice(16 * "qkv".index(part), 16 * "qkv".index(part) + 16)
        if train == "A":
            assert torch.equal(layer.lora_B[rows, start : start + rank], drawn.t())
        else:
            assert torch.equal(layer.lora_A[start : start + rank], drawn)
        start += rank
    assert not (layer.lora_A if train == "A" else layer.lora_B).any()
    assert not stray(layer).any()


@pytest.mark.parametrize(
    ("link", "base", "reset"),
    [
        ({}, "AdamW", "state"),
        ({"init": "two-sided"}, "AdamW", "state"),
        ({"train": "B"}, "AdamW", "transport"),
        ({"train": "B", "init": "selector"}, "AdamW", "transport"),
        ({"train": "A"}, "AdamW", "transport"),
        ({}, "SGD", "keep"),
        ({}, "Muon", "state"),
        ({"r": (4, 2)}, "AdamW", "state"),
        ({"r": (4, 2), "rank_change": "mask"}, "AdamW", "transport"),
        ({"r": (4, 2), "train": "B"}, "AdamW", "transport"),
    ],
    ids=str,
)
def test_parts_change_by_their_own_ranks_and_other_rows_not(link, base, reset):
    model = tiny().double()
    before = copy.deepcopy(model)
    opt = made(model, parts={"c_attn": {"q": 3, "v": 2}}, base=getattr(torch.optim, base), reset=reset, **link)
    for step in range(5):
        run(model, opt, 1, step)
        layer = opt.live.layers["transformer.h.0.attn.c_attn"]
        kept = [layer.lora_B, *(t for t in opt.base.state.get(layer.lora_B, {}).values() if t.dim() == 2)]
        for B in kept:  # moments too
            assert torch.equal(layer.within(B), B)
    opt.finish()
    difference = fused(model).weight - fused(before).weight
    q, k, v = difference.detach().split(16, 1)
    assert not k.any()
    # links of ranks 3, 3, 3, or 3, 2, 2 and 2, 1, 1; a product that was given back has its own rank
    times = 2 if link.get("init") == "two-sided" else 1
    most = [r * times for r in ((7, 4) if "r" in link else (9, 6))]
    ranks = [int((torch.linalg.svdvals(part) > 1e-12 * torch.linalg.matrix_norm(part)).sum()) for part in (q, v)]
    assert all(0 < rank <= limit for rank, limit in zip(ranks, most)), ranks
    if not link:
        assert ranks == most


def test_it_is_the_chain_of_separate_layers():
    """A fused layer with parts trains as three layers of its rows do: the same losses and weights."""

    class Apart(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, rows, bias=False) for rows in (4, 2, 3))
            for layer, own in zip((self.q, self.k, self.v), weight.split((4, 2, 3))):
                layer.weight.data.copy_(own)

        def forward(self, x):
            return torch.cat([self.q(x), self.k(x), self.v(x)], -1)

    class Together(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.qkv = nn.Linear(6, 9, bias=False)
            self.qkv.weight.data.copy_(weight)

        def forward(self, x):
            return self.qkv(x)

    def start(s):
        """By the rows that the layer has: 4, 2, 3."""
        return torch.randn(s.rank, 6, generator=torch.Generator().manual_seed(10 * s.shape[0] + s.link))

    weight = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).double()
    parts = {"q": (2, range(4)), "k": (1, range(4, 6)), "v": (2, range(6, 9))}
    losses, weights = [], []
    for model, own in (
        (Together(weight).double(), {"parts": {"qkv": parts}, "target_modules": ["qkv"]}),
        (
            Apart(weight).double(),
            {"rank_pattern": {"k": 1}, "alpha_pattern": {"k": 2}, "target_modules": ["q", "k", "v"]},
        ),
    ):
        for train in ("both", "B"):
            copied = copy.deepcopy(model)
            config = LinkConfig(r=2, lora_alpha=4, init=start, train=train, **own)
            reset = "transport" if train == "B" else "state"
            opt = ChainOptimizer(torch.optim.AdamW, copied, StepKnots(every=3), link=config, reset=reset, lr=0.05)
            for step in range(7):
                x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).double()
                loss = (copied(x).tanh() - x.sum(-1, keepdim=True)).square().mean()
                losses.append(loss.item())
                loss.backward()
                opt.step()
                opt.zero_grad()
            opt.finish()
            weights.append(torch.cat([p.detach() for p in copied.parameters()]))
    # equal up to the order of sums of at most eight products, over seven steps of Adam
    assert losses[:14] == pytest.approx(losses[14:], rel=1e-9)
    assert torch.allclose(weights[0], weights[2], atol=1e-9)
    assert torch.allclose(weights[1], weights[3], atol=1e-9)


@pytest.mark.parametrize(
    ("way", "link", "reset"),
    [
        ("directory", {}, "state"),
        ("directory", {"train": "B", "init": "selector"}, "transport"),
        ("state dict", {"r": (4, 2), "train": "B"}, "transport"),
        ("pickle", {"train": "B", "init": "selector"}, "transport"),
        ("deepcopy", {"r": (4, 2)}, "state"),
    ],
)
def test_a_run_resumes_bit_for_bit(way, link, reset, tmp_path):
    whole = tiny()
    opt = made(whole, reset=reset, **link)
    run(whole, opt, 3)
    if way == "directory":
        opt.save(tmp_path / "run")
        again = tiny()
        other = made(again, reset=reset, **link)
        other.load(tmp_path / "run")
    elif way == "state dict":
        again = tiny()
        other = made(again, reset=reset, **link)
        again.load_state_dict(copy.deepcopy(whole.state_dict()))
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        other = copy.deepcopy(opt) if way == "deepcopy" else pickle.loads(pickle.dumps(opt))
        again = other.model
    run(whole, opt, 3, 3)
    run(again, other, 3, 3)
    opt.finish()
    other.finish()
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))


def test_a_run_with_other_parts_does_not_take_its_state(tmp_path):
    model = tiny()
    opt = made(model)
    run(model, opt, 1)
    opt.save(tmp_path / "run")
    other = made(tiny(), parts={"c_attn": {"q": 2, "k": 2, "v": 2}})
    with pytest.raises(ValueError, match="c_attn"):
        other.load(tmp_path / "run")


def test_chain_and_adapter_need_nothing_new(tmp_path):
    from peft import PeftModel

    model, base = tiny(), tiny()
    opt = made(model)
    run(model, opt, 5)
    ids = torch.arange(6)[None]
    with opt.merged():
        inside = model(input_ids=ids).logits.detach()
    torch.testing.assert_close(inside, model(input_ids=ids).logits)  # the live link, in fp32
    opt.finish()
    opt.chain.save(tmp_path / "chain")
    rebuilt = Chain.load(tmp_path / "chain").apply(tiny())
    assert torch.equal(fused(rebuilt).weight, fused(model).weight)
    opt.chain.to_peft(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(adapted(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-4)


def test_alpha_pattern_sets_the_scale_of_all_parts():
    opt = made(tiny(), r=(4, 2), lora_alpha=4, scaling="alpha/r", alpha_pattern={"c_attn": 16})
    (plan,) = opt.live.plans.values()
    assert [plan.part_ranks(link) for link in (0, 1)] == [[3, 1, 2], [2, 1, 1]]
    assert [plan.scaling_of(link) for link in (0, 1)] == [4.0, 8.0]


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ({"parts": {"c_attn": {"q": 0}}}, "'q': 0.* must give a positive rank"),
        ({"parts": {"c_attn": {"q": (2, [4, 5])}}}, "must give the rows as a range"),
        ({"parts": {"c_attn": {"q": (2, range(0))}}}, "must give the rows as a range"),
        ({"parts": {"c_attn": 8}}, "must give a dict of parts"),
        ({"parts": ["c_attn"]}, "must be a dict of layers' names"),
        ({"parts": {"(": {"q": 8}}}, "is not a regular expression"),
        ({"parts": {"qkv": {"q": 2}}}, "matches none of the adapted layers, called c_attn"),
        ({"parts": {"c_attn": {"query": 2}}}, "has the parts q, k, v, and no 'query'"),
        ({"parts": {"c_attn": {"q": 17}}}, "rank 17 of 'q' is above the rank of that part .* 16x16"),
        ({"parts": {"c_attn": {"q": (2, range(40, 50))}}}, "has row 49, and the weight of layer .* is 48x16"),
        ({"parts": {"c_attn": {"q": 2, "x": (2, range(15, 17))}}}, "row 15 of layer .* is in 'q' and in 'x'"),
        ({"parts": {"c_attn": {"q": 2}}, "rank_pattern": {"c_attn": 2}}, "both give ranks to"),
        ({"parts": {"c_fc": {"gate": 2}}, "target_modules": ["c_fc"]}, "of the 64 rows .* are 'gate' is not known"),
        (
            {"parts": {"wte": {"q": 2}}, "target_modules": ["wte"]},
            "matches 'transformer.wte', which is no linear layer",
        ),
    ],
)
def test_refusals(link, why):
    model = tiny()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises((ValueError, TypeError), match=why):
        made(model, **link)
    assert [type(m) for m in model.modules()] == kinds


def test_a_shard_of_a_projection_is_not_guessed():
    model = tiny()
    fused(model).weight = nn.Parameter(torch.zeros(16, 24))
    with pytest.raises(ValueError, match=r"of the 24 rows .* are 'q' is not known here"):
        made(model, parts={"c_attn": {"q": 2}})


def test_peft_layers_have_no_parts():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["c_attn"]))
    with pytest.raises(ValueError, match="conflicts with the model's PEFT layers"):
        ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LinkConfig(parts=PARTS))
