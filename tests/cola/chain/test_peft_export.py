"""A chain leaves as one PEFT adapter, whole or truncated; PEFT itself is the judge."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from cola import Chain, ChainOptimizer, Factor, KnotReport, Link, LinkConfig, StepKnots
from cola.chain import spectrum, tensorfile
from tests.cola.chain.opt_chains import close, fit, output
from tests.models import BODY, Net, tiny_gpt2, tiny_opt, train

pytestmark = pytest.mark.numerics

peft = pytest.importorskip("peft")


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


# diagnostics


def test_norms_and_overlap_agree_with_the_full_matrices():
    _, chain = fit(Net(), target_modules=BODY)
    norms, ranks = chain.norms(), chain.effective_rank()
    for path in BODY:
        full = [link.factors[path].delta() for link in chain]
        assert norms[path] == pytest.approx([d.norm().item() for d in full], rel=1e-12)
        for side in ("out", "in"):
            bases = [torch.linalg.svd(d if side == "out" else d.T).U[:, :2] for d in full]
            expected = torch.linalg.svdvals(bases[0].T @ bases[1])
            assert torch.allclose(chain.overlap(0, 1, side)[path], expected, rtol=0, atol=1e-9)
            assert torch.allclose(chain.overlap(2, 2, side)[path], torch.ones(2).double(), rtol=0, atol=1e-9)
        precision = torch.finfo(torch.float32).eps * max(full[0].shape)
        assert ranks[path] == torch.linalg.matrix_rank(sum(full), rtol=precision)
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
    A, B, values = spectrum.truncate(factors, 2)
    count = min(len(values), len(wanted))
    assert torch.allclose(values[:count], wanted[:count], atol=1e-12 * wanted[0].item())
    assert torch.allclose(B @ A, (u[:, :2] * wanted[:2]) @ v[:2], atol=1e-12 * wanted[0].item())
    assert A.shape == (2, inner)
    assert B.shape == (out, 2)
