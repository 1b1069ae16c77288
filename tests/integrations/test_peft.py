"""Chains on PEFT's own layers: the same run as on plain layers, and every layer that cannot carry one says why."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn

from cola import Chain, ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from tests.models import tiny_gpt2, tiny_opt

peft = pytest.importorskip("peft")

IDS = torch.arange(48).view(4, 12) * 7 % 32


def lora(**changes):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes})


def wrapped(base=None, how="get_peft_model", **changes):
    """A base with LoRA layers; PEFT draws them from the global generator, which is left as it was."""
    base = tiny_opt() if base is None else base
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if how == "get_peft_model":
            return peft.get_peft_model(base, lora(**changes))
        if how == "inject":
            return peft.inject_adapter_in_model(lora(**changes), base)
        base.add_adapter(lora(**changes))
        return base


def train(model, opt, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        opt.zero_grad()
        loss = model(input_ids=IDS.roll(step, 1), labels=IDS.roll(step, 1)).loss
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def chained(model, policy=None, **kwargs):
    return ChainOptimizer(torch.optim.AdamW, model, policy or StepKnots(every=3), **{"lr": 0.05, **kwargs})


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("how", ["get_peft_model", "inject", "add_adapter"])
def test_a_chain_on_pefts_layers_is_the_chain_on_plain_layers(how):
    """Same first factors, same draws by name: the runs differ only in how each forward is summed."""
    ours, theirs = tiny_opt(), wrapped(how=how)
    link = LinkConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init="kaiming")
    one, two = chained(ours, link=link), chained(theirs)
    assert one.live.layers.keys() == two.live.layers.keys()
    with torch.no_grad():
        for path, layer in two.live.layers.items():
            one.live.layers[path].lora_A.copy_(layer.lora_A)
    mine, other = train(ours, one, 8), train(theirs, two, 8)
    # both are fp32 sums of at most 32 terms in another order, amplified by 8 Adam steps of size lr
    assert other == pytest.approx(mine, rel=2e-4)
    assert len(two.chain) == 2
    assert torch.equal(one.live.prepare(2)[path].A, two.live.prepare(2)[path].A)


@pytest.mark.parametrize("how", ["get_peft_model", "inject"])
def test_finish_leaves_pefts_layers_with_a_link_that_adds_nothing(how):
    model = wrapped(how=how)
    keys, grads = list(model.state_dict()), {n: p.requires_grad for n, p in model.named_parameters()}
    opt = chained(model)
    train(model, opt, 7)
    before = logits(model)
    report = opt.finish()
    assert report.index == 2
    # W + sBA summed before the product instead of after: fp32 rounding of products of width 16
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert list(model.state_dict()) == keys
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    with model.disable_adapter() if how == "get_peft_model" else torch.no_grad():
        assert torch.equal(logits(model), logits(model))
    assert all((layer.lora_B["default"].weight == 0).all() for layer in lora_layers(model))
    ChainOptimizer(torch.optim.SGD, model, NeverKnots(), lr=0.1).finish()


def lora_layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["fc2"]}, {"bias": "lora_only"}], ids=str)
def test_trained_parameters_are_counted_as_peft_counts_them(changes, capsys):
    model = wrapped(**changes)
    model.print_trainable_parameters()
    opt = chained(model)
    opt.print_trainable_parameters()
    theirs, ours = capsys.readouterr().out.splitlines()
    assert ours == theirs
    train(model, opt, 4)
    opt.finish()
    assert [report.share > 0 for report in opt.reports] == [True, True]
    opt.print_trainable_parameters()
    assert capsys.readouterr().out.splitlines() == [theirs]


def test_unloading_after_finish_gives_the_original_class_with_the_chain_in_its_weights(tmp_path):
    base = tiny_opt()
    model = wrapped(copy.deepcopy(base))
    opt = chained(model)
    train(model, opt, 7)
    opt.finish()
    plain = model.unload()
    assert type(plain) is type(base)
    assert list(plain.state_dict()) == list(base.state_dict())
    # the ledger's names are the original model's, so the links also tie into a fresh one, to the same bits
    opt.chain.apply(base)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), base.parameters()))
    plain.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(plain))


def test_the_chain_leaves_as_one_adapter_for_the_original_base(tmp_path):
    base = tiny_opt()
    model = wrapped(copy.deepcopy(base))
    opt = chained(model)
    train(model, opt, 7)
    opt.finish()
    opt.chain.to_peft(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


def test_a_trap_after_a_knot_pefts_own_checkpoint_is_not_the_model(tmp_path):
    """An adapter-only file cannot hold what was tied; opt.save can, over the same untouched base."""
    model = wrapped()
    opt = chained(model)
    train(model, opt, 4)
    model.save_pretrained(tmp_path / "adapter")
    opt.save(tmp_path / "chain")
    adapter_only = peft.PeftModel.from_pretrained(tiny_opt(), tmp_path / "adapter")
    assert not torch.allclose(logits(adapter_only), logits(model), atol=1e-3)
    resumed = wrapped()
    again = chained(resumed)
    again.load(tmp_path / "chain")
    assert torch.equal(logits(resumed), logits(model))
    model.train(), resumed.train()
    assert train(resumed, again, 5, start=4) == train(model, opt, 5, start=4)
    assert len(Chain.load(tmp_path / "chain")) == 1


@pytest.mark.parametrize("r", [4, (4, 2, 1)], ids=str)
@pytest.mark.parametrize("steps", [2, 3, 5])
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_state_dicts_resume_bit_for_bit(r, steps, first):
    model, resumed = wrapped(), wrapped(tiny_opt(seed=9))
    opt, again = (chained(m, link=LinkConfig(r=r)) for m in (model, resumed))
    train(model, opt, steps)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for part in ("model", "optimizer") if first == "model" else ("optimizer", "model"):
        {"model": resumed, "optimizer": again}[part].load_state_dict(saved[part])
    assert train(resumed, again, 5, start=steps) == train(model, opt, 5, start=steps)
    assert [layer.r["default"] for layer in lora_layers(resumed)] == [
        layer.r["default"] for layer in lora_layers(model)
    ]


def test_rank_steps_down_on_pefts_layers():
    model = wrapped()
    opt = chained(model, link=LinkConfig(r=(4, 2)))
    train(model, opt, 4)
    layer = lora_layers(model)[0]
    assert layer.lora_A["default"].weight.shape == (2, 16)
    assert (layer.lora_A["default"].out_features, layer.lora_B["default"].in_features, layer.r["default"]) == (2, 2, 2)
    assert [link.rank for link in opt.chain] == [4]


def test_rslora_keeps_its_scale():
    model = wrapped(use_rslora=True)
    opt = chained(model)
    train(model, opt, 4)
    assert opt.live.scaling == 4.0  # alpha/√r = 8/2, of the second link too
    assert opt.chain[0].factors["model.decoder.layers.0.self_attn.q_proj"].scaling == 4.0


def test_dropout_and_bf16_adapters_stay_pefts():
    model = wrapped(tiny_opt().to(torch.bfloat16), how="inject", lora_dropout=0.5)
    opt = chained(model)
    train(model, opt, 4)
    layer = lora_layers(model)[0]
    assert isinstance(layer.lora_dropout["default"], nn.Dropout)
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    assert opt.chain[0].factors["model.decoder.layers.0.self_attn.q_proj"].A.dtype == torch.bfloat16
    fp32 = wrapped(tiny_opt().to(torch.bfloat16))
    assert chained(fp32).live.adapters()[0].dtype == torch.float32


def test_what_peft_trains_beside_the_links_is_trained_and_recorded():
    base = tiny_opt(tie_word_embeddings=False)
    model = wrapped(copy.deepcopy(base), bias="lora_only", modules_to_save=["lm_head"])
    opt = chained(model)
    train(model, opt, 4)
    bias, head = "model.decoder.layers.0.self_attn.q_proj.bias", "lm_head.weight"
    assert {bias, head} <= set(opt.chain[0].trained)
    assert opt.state[opt.live.trained()[head]]["step"].item() == 4
    opt.finish()
    opt.chain.apply(base)
    assert torch.allclose(logits(base), logits(model), atol=1e-5)


def test_gpt2s_transposed_layers():
    model = wrapped(tiny_gpt2(tie_word_embeddings=False), target_modules=["c_attn"])
    opt = chained(model)
    train(model, opt, 4)
    before = logits(model)
    opt.finish()
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_copies_go_on_alone():
    model = wrapped()
    opt = chained(model)
    train(model, opt, 2)
    twin_model, twin = copy.deepcopy((model, opt))
    assert train(twin_model, twin, 4, start=2) == train(model, opt, 4, start=2)


def with_a_base_at_two_places():
    model = wrapped()
    layer = model.get_submodule("base_model.model.model.decoder.layers.0.self_attn.q_proj")
    model.get_base_model().again = layer.base_layer
    return model


def with_two_methods():
    model = wrapped()
    peft.inject_adapter_in_model(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), model)
    return model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.linear = nn.Embedding(8, 4), nn.Conv2d(1, 2, 3), nn.Linear(4, 4)


def with_two_adapters():
    model = wrapped()
    model.add_adapter("other", lora())
    return model


def merged():
    model = wrapped()
    model.merge_adapter()
    return model


def disabled():
    model = wrapped()
    model.base_model.disable_adapter_layers()
    return model


def net(config=None, **changes):
    return peft.get_peft_model(Net(), config or peft.LoraConfig(r=2, **changes))


def owned():
    model = wrapped()
    chained(model)
    return model


REFUSED = {
    "two adapters": (with_two_adapters, "carries the PEFT adapters default, other: .* delete_adapter"),
    "merged": (merged, "adapter merged: call unmerge_adapter"),
    "disabled": (disabled, "adapter disabled: call enable_adapter_layers"),
    "DoRA": (lambda: wrapped(use_dora=True), "uses DoRA, whose update is more than s·BA"),
    "lora_bias": (lambda: wrapped(lora_bias=True), "lora_bias=True, an update in addition"),
    "embedding": (lambda: net(target_modules=["embed"]), "'embed' is an embedding with a PEFT adapter"),
    "Conv2d": (lambda: net(target_modules=["conv"]), "'conv' is a Conv2d of PEFT, whose factors are not plain"),
    "IA3": (
        lambda: net(peft.IA3Config(target_modules=["linear"], feedforward_modules=[])),
        "no LoRA layer; chains are made of LoRA",
    ),
    "owned": (owned, "already carries a link: another ChainOptimizer owns this model"),
    "tied head": (
        lambda: wrapped(tiny_opt(tie_word_embeddings=True), target_modules=["lm_head"]),
        "the weight of 'lm_head' is tied",
    ),
    "base at two places": (with_a_base_at_two_places, r"has its base layer at '.*again' as well"),
    "two methods": (with_two_methods, "is no LoRA layer, so a chain would leave out"),
    "tokens": (lambda: wrapped(trainable_token_indices=[1]), "trainable_token_indices=.* trains rows of an"),
    "tokens, injected": (
        lambda: wrapped(how="inject", trainable_token_indices={"embed_tokens": [1]}),
        r"trainable_token_indices=.* give the rows to the chain, by LinkConfig\(trainable_token_indices=",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_carry_a_chain_is_refused_with_the_reason(name):
    make, message = REFUSED[name]
    model = make()
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        chained(model)
    after = dict(model.named_parameters())
    assert all(after[n].requires_grad == g and torch.equal(after[n], v) for n, (g, v) in before.items())


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ({"r": 2}, r"r=2\) starts with rank 2, and the model's PEFT layers have rank 4"),
        ({"r": (8, 4)}, "starts with rank 8"),
        ({"lora_alpha": 4}, "means a scale of 1, and the model's PEFT layers have 2"),
        ({"target_modules": ["k_proj"]}, "target_modules=.* conflicts with the model's PEFT layers"),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1.* conflicts"),
        ({"bias": "lora_only"}, "bias='lora_only'.* conflicts"),
        ({"dtype": torch.bfloat16}, "dtype=.* conflicts"),
        ({"train": "A"}, "needs a first link whose B is drawn"),
    ],
    ids=str,
)
def test_a_link_config_that_disagrees_with_pefts_is_refused(link, message):
    with pytest.raises(ValueError, match=message):
        chained(wrapped(), link=LinkConfig(**link))


def test_a_failing_base_leaves_pefts_link_as_it_was():
    model = wrapped(init_lora_weights=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError):
        chained(model, no_such_argument=1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    chained(model)


def test_nothing_is_imported_before_it_is_met():
    code = """
import sys, torch
from cola import ChainOptimizer, LinkConfig, NeverKnots
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=LinkConfig(r=2, target_modules="all-linear"), lr=0.1).finish()
assert not {"peft", "bitsandbytes", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
