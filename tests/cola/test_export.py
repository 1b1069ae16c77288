"""A chain leaves as one PEFT adapter and comes in from one; PEFT itself is the judge."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from cola import (
    Chain,
    ChainOptimizer,
    Factor,
    KnotReport,
    Link,
    LinkConfig,
    NeverKnots,
    StepKnots,
    StoreError,
    files,
    subspace,
    tensorfile,
)
from tests.models import BODY, Net, loss_of, tiny_gpt2, tiny_opt, train

peft = pytest.importorskip("peft")

IDS = torch.arange(24).view(2, 12) % 30


class TwoLayers(nn.Module):
    """Layers with a dot in their paths, and one elsewhere whose path ends the same."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.body = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6))
        self.other = nn.ModuleDict({"body": nn.Sequential(nn.Identity(), nn.Linear(6, 3))})
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 3)

    def forward(self, x):
        return self.other["body"](self.body(x))


def fit(model, links=3, lr=0.05, **link):
    """Train a chain; returns the merged model and the chain."""
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(**{"r": 2, **link}), lr=lr)
    for step in range(2 * links - 1):
        opt.zero_grad()
        if hasattr(model, "config"):
            model(input_ids=IDS, labels=IDS).loss.backward()
        else:
            loss_of(model, step).backward()
        opt.step()
    opt.finish()
    return model.eval(), opt.chain


def output(model):
    model.eval()
    with torch.no_grad():
        if hasattr(model, "config") and hasattr(model.config, "vocab_size"):
            return model(input_ids=IDS).logits
        return model(torch.randn(5, 6, generator=torch.Generator().manual_seed(1)))


def close(one, other, steps=64):
    """fp32 sums of the same products in another order: some units of the last place of the largest output."""
    return (one - other).abs().max() <= steps * torch.finfo(torch.float32).eps * one.abs().max()


MODELS = {
    "linear": (tiny_opt, {}),
    "conv1d": (tiny_gpt2, {}),
    "names without dots": (Net, {"target_modules": BODY}),
    "names with dots": (TwoLayers, {"target_modules": r"body\.[02]"}),
    "rank step-down": (tiny_opt, {"r": (4, 2, 1)}),
    "biases": (tiny_opt, {"bias": "lora_only"}),
    "biases without dots": (Net, {"target_modules": BODY, "bias": "lora_only"}),
    "head": (Net, {"target_modules": BODY, "modules_to_save": ["head"]}),
    "head and biases": (Net, {"target_modules": BODY, "modules_to_save": ["head"], "bias": "lora_only"}),
    "tied head": (tiny_opt, {"modules_to_save": ["lm_head"]}),
    "tied embeddings": (tiny_opt, {"modules_to_save": ["embed_tokens"]}),
    "tied, both": (tiny_opt, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "untied head": (lambda: tiny_opt(tie_word_embeddings=False), {"modules_to_save": ["lm_head"]}),
    "untied embeddings": (lambda: tiny_opt(tie_word_embeddings=False), {"modules_to_save": ["embed_tokens"]}),
    "two modules": (lambda: tiny_opt(tie_word_embeddings=False), {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "half-precision factors": (tiny_opt, {"lora_alpha": 3, "dtype": torch.bfloat16}),
    "scale": (tiny_opt, {"lora_alpha": 3, "r": (3, 2), "scaling": "rslora"}),
    "all linear": (tiny_gpt2, {"target_modules": "all-linear"}),
}


@pytest.mark.parametrize("case", MODELS)
def test_peft_loads_the_chain_on_the_original_base(case, tmp_path, recwarn):
    make, link = MODELS[case]
    merged, chain = fit(make(), **link)
    errors = chain.to_peft(tmp_path)
    assert set(errors.values()) == {0.0}
    base = make()
    assert not close(output(merged), output(base)), "training changed nothing"
    adapted = peft.PeftModel.from_pretrained(base, tmp_path)
    assert close(output(merged), output(adapted))
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message) or "missing" in str(w.message)]
    layers = {n.removesuffix(".lora_A.default") for n, _ in adapted.named_modules() if n.endswith("lora_A.default")}
    assert layers == {f"base_model.model.{path}" for path in chain.layers()}
    assert close(output(merged), output(adapted.merge_and_unload()))


def test_the_adapter_matches_a_bf16_merge_within_what_the_reports_say(tmp_path):
    """Weights of base + adapter differ from the merged ones by the recorded loss and no more."""
    model = Net(dtype=torch.bfloat16)
    opt = ChainOptimizer(
        torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(r=2, target_modules=BODY), lr=0.02
    )
    train(opt, model, 7, dtype=torch.bfloat16)
    opt.finish()
    opt.chain.to_peft(tmp_path)
    wide = peft.PeftModel.from_pretrained(Net(dtype=torch.bfloat16).float(), tmp_path).merge_and_unload()
    for path in BODY:
        exact, merged = wide.get_submodule(path).weight, model.get_submodule(path).weight.float()
        lost = sum(link.report.layers[path].lost_norm for link in opt.chain)  # triangle inequality
        assert 0 < (exact - merged).norm() <= lost * (1 + 1e-5)


def test_layers_of_different_ranks(tmp_path):
    """Links that touch different layers: PEFT's rank_pattern, with a path that another one ends in."""
    torch.manual_seed(0)
    base = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(4, 4)), "b": nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4))})}
    )
    paths = ["a.0", "b.a.0"]
    made = []
    for index, layers in enumerate([paths, paths[:1], paths[:1]]):
        factors = {p: Factor(torch.randn(1, 4), torch.randn(4, 1), 0.5, "nearest") for p in layers}
        made.append(Link(index, 0, factors, {}, KnotReport(index, 1, 1, 1.0, 0.0, None, 0.0)))
    chain = Chain(made)
    chain.to_peft(tmp_path)
    merged = copy.deepcopy(base)
    chain.apply(merged)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    for path in paths:
        assert close(merged.get_submodule(path).weight, adapted.get_submodule(path).weight)
    again = Chain.from_peft(tmp_path)
    assert {p: f.rank for p, f in again[0].factors.items()} == {"a.0": 3, "b.a.0": 1}


@pytest.mark.parametrize("r", [1, 2, 3, 5, 6, 9])
def test_truncation_is_the_best_and_its_error_is_the_tail(r, tmp_path):
    _, chain = fit(Net(), target_modules=BODY)
    errors = chain.to_peft(tmp_path, r=r)
    tensors, _ = tensorfile.load((tmp_path / "adapter_model.safetensors").read_bytes(), tmp_path)
    account = json.loads((tmp_path / "export.json").read_text())
    for path in BODY:
        delta = chain.delta(path)
        A, B = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
        assert A.shape[0] == (r if r < 6 else 6)  # Σr is 6: nothing is padded beyond the exact adapter
        tail = torch.linalg.svdvals(delta)[r:].square().sum().sqrt().item() if r < 6 else 0.0
        # the factors are stored in fp32, so each product is within a few units of its last place
        slack = 8 * torch.finfo(torch.float32).eps * delta.norm().item()
        assert abs((B @ A - delta).norm().item() - tail) <= slack
        assert math.isclose(errors[path], tail, abs_tol=1e-12)
        assert account["error"][path] == errors[path]
        assert math.isclose(account["norm"][path], delta.norm().item(), rel_tol=1e-12)
    peft.PeftModel.from_pretrained(Net(), tmp_path)


def test_truncation_never_forms_the_full_matrix(tmp_path):
    """A layer of 2^20 x 2^20 would take 4 TB."""
    n = 1 << 20
    factor = Factor(torch.randn(2, n), torch.randn(n, 2), 1.0, "nearest")
    chain = Chain([Link(0, 0, {"a.b": factor}, {}, KnotReport(0, 1, 2, 1.0, 0.0, None, 0.0))])
    chain.to_peft(tmp_path, r=1)
    assert len(chain.singular_values("a.b")) == 2


def test_the_base_is_named(tmp_path):
    model = tiny_opt()
    model.config._name_or_path = "some/model"
    _, chain = fit(model)
    chain.to_peft(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"
    chain.to_peft(tmp_path, base_model="another/model")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "another/model"


def test_bad_requests_are_refused(tmp_path):
    _, chain = fit(Net(), target_modules=BODY)
    for r in (0, -1, 2.5, True, "4"):
        with pytest.raises(ValueError, match=r"r=.* must be a positive integer"):
            chain.to_peft(tmp_path / "x", r=r)
    with pytest.raises(ValueError, match="nothing to export"):
        Chain().to_peft(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_merged_model_is_a_plain_one(tmp_path):
    merged, _ = fit(tiny_opt())
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(output(merged), output(again))


# import


IMPORTS = {
    "linear": (tiny_opt, {"target_modules": ["q_proj", "v_proj"]}),
    "conv1d": (tiny_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "rslora": (tiny_opt, {"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        tiny_opt,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2, "^model.decoder.layers.0.self_attn.q_proj": 5},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 7},
        },
    ),
    "expressions": (
        tiny_opt,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r".*layers\.\d+\.self_attn.(q|k)_proj": 2},
            "alpha_pattern": {r"^model\.decoder\.layers\.[01]\..*v_proj$": 7},
        },
    ),
    "all linear": (tiny_opt, {"target_modules": "all-linear"}),
    "biases": (tiny_opt, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "all biases": (tiny_opt, {"target_modules": ["q_proj"], "bias": "all"}),
    "modules to save": (Net, {"target_modules": BODY, "modules_to_save": ["head"]}),
}


def adapter(case, directory):
    """An adapter that PEFT made, with random factors; returns the model that PEFT merges it into."""
    make, options = IMPORTS[case]
    model = peft.get_peft_model(make(), peft.LoraConfig(r=3, lora_alpha=6, **options))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) / 4)
    model.save_pretrained(directory)
    return make, model.merge_and_unload()


@pytest.mark.parametrize("case", IMPORTS)
def test_a_peft_adapter_becomes_a_first_link(case, tmp_path):
    make, expected = adapter(case, tmp_path)
    chain, model = Chain.from_peft(tmp_path), make()
    assert not close(output(model), output(expected))
    chain.apply(model)
    assert close(output(model), output(expected))
    chain.save(tmp_path / "chain")
    Chain.load(tmp_path / "chain").to_peft(tmp_path / "again")
    assert close(output(peft.PeftModel.from_pretrained(make(), tmp_path / "again")), output(expected))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_weight_is_recorded_under_each_name(name, tmp_path):
    """PEFT replaces a module, not the tensor that it shares: both have to be in the adapter, and in the chain."""
    merged, chain = fit(tiny_opt(), modules_to_save=[name])
    assert set(chain[-1].trained) == {"lm_head.weight", "model.decoder.embed_tokens.weight"}
    chain.save(tmp_path / "chain")
    again = tiny_opt()
    Chain.load(tmp_path / "chain").apply(again)
    assert torch.equal(output(merged), output(again))
    chain.to_peft(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "model.decoder.embed_tokens"]
    # and through the adapter back, on a tied model and on an untied one
    for base in (tiny_opt(), untied()):
        Chain.from_peft(tmp_path / "adapter").apply(base)
        assert close(output(merged), output(base))


def untied():
    """The same values as `tiny_opt`'s, with a head of its own."""
    model = tiny_opt(tie_word_embeddings=False)
    model.load_state_dict(tiny_opt().state_dict())
    return model


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_weight_that_was_trained_alone_is_not_applied_to_a_tied_model(name, tmp_path):
    model = peft.get_peft_model(
        untied(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=[name])
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    model.save_pretrained(tmp_path)
    chain, tied, base = Chain.from_peft(tmp_path), tiny_opt(), untied()
    with pytest.raises(ValueError, match=r"apart from .* are one tensor .*: untie them first"):
        chain.apply(tied)
    assert torch.equal(output(tied), output(tiny_opt()))
    chain.apply(base)
    assert close(output(base), output(model))


def test_undo_of_a_tied_weight_from_weights_that_hold_it_once():
    model, chain = fit(tiny_opt(), links=1, modules_to_save=["lm_head"])
    weights = tiny_opt().state_dict()
    del weights["lm_head.weight"]
    chain.undo(model, weights)
    assert torch.equal(output(model), output(tiny_opt()))


def test_training_goes_on_after_an_imported_link(tmp_path):
    make, expected = adapter("linear", tmp_path / "adapter")
    model = make()
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LinkConfig(r=2), lr=0.05)
    opt.follow(Chain.from_peft(tmp_path / "adapter"))
    assert close(output(model), output(expected))
    model.train()
    for _ in range(3):
        opt.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        opt.step()
    opt.finish()
    assert [link.rank for link in opt.chain] == [3, 2]
    opt.chain.to_peft(tmp_path / "both")
    adapted = peft.PeftModel.from_pretrained(make(), tmp_path / "both")
    assert close(output(model), output(adapted))


REFUSED = {
    "DoRA": ({"use_dora": True}, "use_dora=True"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
    "not LoRA": ({"peft_type": "IA3"}, "of type 'IA3'"),
    "future": ({"some_new_variant": {"x": 1}}, "some_new_variant"),
    "lora bias": ({"lora_bias": True}, "lora_bias=True"),
    "replicated": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "rank": ({"r": 7}, "has rank 3, and adapter_config.json says otherwise"),
    "alpha": ({"lora_alpha": None}, "gives layer .* the rank or alpha None"),
    "infinite": ({"lora_alpha": 1e999}, "Infinity is not a finite number"),
    "huge": ({"lora_alpha": 10**400}, "the rank or alpha 10000"),
    "a truth": ({"lora_alpha": True}, "the rank or alpha True"),
    "pattern": ({"rank_pattern": {"(": 3}}, "bad pattern"),
    "slow pattern": ({"alpha_pattern": {"(a+)+": 3}}, "too intricate"),
    "alternatives": ({"alpha_pattern": {"(a|a|aa)" * 60: 3}}, "too intricate"),
    "options": ({"alpha_pattern": {"a?" * 60: 3}}, "too intricate"),
    "groups in groups": ({"alpha_pattern": {"((a|b)c)": 3}}, "too intricate"),
    "repeated": ({"alpha_pattern": {".*.*.*x": 3}}, "too intricate"),
    "repeated group": ({"alpha_pattern": {"(?:a+){9}": 3}}, "too intricate"),
    "reference": ({"alpha_pattern": {r"(a+)\1+": 3}}, "too intricate"),
    "look ahead": ({"alpha_pattern": {"(?=a)": 3}}, "too intricate"),
    "long": ({"alpha_pattern": {"a" * 600: 3}}, "too intricate"),
    "deep groups": ({"alpha_pattern": {"(" * 250 + ")" * 250: 3}}, "bad pattern|too intricate"),
    "huge count": ({"alpha_pattern": {"a{99999999999999999999}": 3}}, "bad pattern"),
    "patterns": ({"alpha_pattern": [1]}, "not an object"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_adapters_that_are_more_than_lora_are_refused(what, tmp_path):
    adapter("linear", tmp_path)
    change, message = REFUSED[what]
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StoreError, match=message):
        Chain.from_peft(tmp_path)


TENSORS = {
    "no factors": ({}, "holds no LoRA factors"),
    "A alone": ({"x.lora_A.weight": torch.ones(3, 2)}, "are not factors"),
    "B alone": ({"x.lora_B.weight": torch.ones(2, 3)}, "without its lora_A"),
    "shapes": ({"x.lora_A.weight": torch.ones(3, 2), "x.lora_B.weight": torch.ones(2, 2)}, "are not factors"),
    "convolution": (
        {"x.lora_A.weight": torch.ones(3, 2, 1), "x.lora_B.weight": torch.ones(2, 3, 1)},
        "are not factors",
    ),
    "integers": ({"x.lora_A.weight": torch.ones(3, 2).int(), "x.lora_B.weight": torch.ones(2, 3)}, "are not factors"),
    "embedding": ({"x.lora_embedding_A": torch.ones(3, 2)}, "not part of a plain LoRA"),
    "magnitude": ({"x.lora_magnitude_vector": torch.ones(3)}, "not part of a plain LoRA"),
    "rank 0": ({"x.lora_A.weight": torch.ones(0, 2), "x.lora_B.weight": torch.ones(2, 0)}, "rank 0"),
    "a path": ({"../x.lora_A.weight": torch.ones(3, 2), "../x.lora_B.weight": torch.ones(2, 3)}, "refused"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_files_that_are_not_lora_are_refused(what, tmp_path):
    tensors, message = TENSORS[what]
    r = 0 if what == "rank 0" else 3
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": 1}))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    files.write(tmp_path / "adapter_model.safetensors", tensorfile.dump(named, metadata={"format": "pt"}))
    with pytest.raises(StoreError, match=message):
        Chain.from_peft(tmp_path)


# diagnostics


def test_norms_and_overlap_agree_with_the_full_matrices():
    _, chain = fit(Net(), target_modules=BODY)
    norms = chain.norms()
    for path in BODY:
        full = [link.factors[path].delta() for link in chain]
        assert norms[path] == pytest.approx([d.norm().item() for d in full], rel=1e-12)
        for side in ("out", "in"):
            bases = [torch.linalg.svd(d if side == "out" else d.T).U[:, :2] for d in full]
            expected = torch.linalg.svdvals(bases[0].T @ bases[1])
            assert torch.allclose(chain.overlap(0, 1, side)[path], expected, rtol=0, atol=1e-9)
            assert torch.allclose(chain.overlap(2, 2, side)[path], torch.ones(2).double(), rtol=0, atol=1e-9)
    assert chain.effective_rank() == {"first": 6, "second": 6}
    with pytest.raises(ValueError, match="side='left' is unknown"):
        chain.overlap(0, 1, "left")


def test_overlap_of_orthogonal_and_empty_links():
    def link(index, column, scale=1.0):
        A = torch.zeros(1, 4)
        A[0, column] = scale
        return Link(index, 0, {"x": Factor(A, A.T.clone(), 1.0, "nearest")}, {}, KnotReport(index, 1, 1, 1, 0, None, 0))

    chain = Chain([link(0, 0), link(1, 2), link(2, 0, 0.0)])
    assert chain.overlap(0, 1)["x"].tolist() == [0.0]
    assert chain.overlap(0, 2)["x"].numel() == 0
    assert chain.norms() == {"x": [1.0, 1.0, 0.0]}
    assert chain.effective_rank() == {"x": 2}


@pytest.mark.parametrize(("out", "inner", "ranks"), [(9, 7, (3, 2)), (9, 7, (4, 5)), (4, 30, (2, 2, 2)), (30, 4, (4,))])
def test_truncation_equals_the_dense_svd(out, inner, ranks):
    """Sum of ranks below, between and above the two sides."""
    g = torch.Generator().manual_seed(0)
    factors = [
        Factor(torch.randn(r, inner, generator=g), torch.randn(out, r, generator=g), 0.5 + r, "nearest") for r in ranks
    ]
    update = sum(f.delta() for f in factors)
    u, wanted, v = torch.linalg.svd(update, full_matrices=False)
    A, B, values = subspace.truncate(factors, 2)
    count = min(len(values), len(wanted))
    assert torch.allclose(values[:count], wanted[:count], atol=1e-12 * wanted[0].item())
    assert torch.allclose(B @ A, (u[:, :2] * wanted[:2]) @ v[:2], atol=1e-12 * wanted[0].item())
    assert A.shape == (2, inner)
    assert B.shape == (out, 2)
