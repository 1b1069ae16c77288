"""Bad input is refused by name, with its value and what to do, and nothing has changed: one table."""

import copy

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from tests.models import BODY, Net, tiny_gpt2, tiny_opt, train

Adam = torch.optim.AdamW


def make(model=None, base=Adam, policy=None, rounding="auto", seed=0, lr=0.01, **link):
    link = {"target_modules": BODY, "r": 2, **link}
    return ChainOptimizer(
        base, model or Net(), policy or NeverKnots(), link=LinkConfig(**link), rounding=rounding, seed=seed, lr=lr
    )


def shared_head():
    model = tiny_opt()
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    return model


def quantised(dtype):
    model = Net()
    model.first.weight = nn.Parameter(torch.zeros(6, 6, dtype=dtype), requires_grad=False)
    return model


def parametrized():
    model = Net()
    nn.utils.parametrizations.weight_norm(model.first)
    return model


def dispatched():
    model = Net()
    model.first.forward = model.first.forward
    return model


def attention(**options):
    return nn.Sequential(nn.MultiheadAttention(8, 2, **options), nn.Linear(8, 8))


def slashed():
    model = nn.Sequential()
    model.add_module("a/b", nn.Linear(4, 4))
    return model


def twice():
    model = Net()
    make(model)
    return model


TABLE = [
    # targets
    (lambda: make(target_modules=["frist"]), ValueError, r"no module is called 'frist'; .* first"),
    (lambda: make(target_modules=["first", "nope"]), ValueError, "no module is called 'nope'"),
    (lambda: make(target_modules=[]), ValueError, r"target_modules=\[\] is empty"),
    (
        lambda: make(target_modules="fir"),
        ValueError,
        r"no module is called 'fir'.*regular expression for the whole path",
    ),
    (lambda: make(target_modules="("), ValueError, r"target_modules='\(' is not a regular expression"),
    (lambda: make(target_modules=None), ValueError, r"target_modules=None means the query and value.*first"),
    (lambda: make(nn.Sequential(nn.ReLU()), target_modules="all-linear"), ValueError, "has no linear layer"),
    (lambda: make(nn.Sequential(nn.Bilinear(3, 3, 3)), target_modules=["0"]), ValueError, "layer '0' is a Bilinear: l"),
    (
        lambda: make(nn.Sequential(nn.ConvTranspose2d(3, 3, 1)), target_modules=["0"]),
        ValueError,
        "is a ConvTranspose2d",
    ),
    (lambda: make(nn.Sequential(nn.Embedding(3, 3, max_norm=1.0)), target_modules=["0"]), ValueError, "has max_norm"),
    (lambda: make(attention(), target_parameters=["in_proj"]), ValueError, "no parameter is called 'in_proj'; near"),
    (
        lambda: make(attention(kdim=3), target_modules=["out_proj"], target_parameters=["in_proj_weight"]),
        ValueError,
        "no parameter is called 'in_proj_weight'; near are",
    ),
    (lambda: make(attention(), target_modules=[], target_parameters=["in_proj_bias"]), ValueError, "has the shape"),
    (lambda: make(attention(), target_modules=["out_proj"], lora_dropout=0.1), ValueError, "has no effect on '0.out"),
    (lambda: make(dispatched()), ValueError, "forward replaced on the instance"),
    (lambda: make(parametrized()), ValueError, "a weight that is computed"),
    (
        lambda: make(shared_head(), target_modules=["lm_head"]),
        ValueError,
        r"weight of 'lm_head' is tied \(.*embed_tokens",
    ),
    (lambda: make(quantised(torch.int8)), ValueError, r"layer 'first' has a torch.int8 weight \(quantised\?\)"),
    (lambda: make(quantised(torch.float8_e4m3fn)), ValueError, "float8_e4m3fn weight"),
    (lambda: make(quantised(torch.complex64)), ValueError, "complex64 weight"),
    (lambda: make(Net().to("meta")), ValueError, "'first' has its weight on the meta device: load the weights"),
    (lambda: make(slashed(), target_modules="all-linear"), ValueError, "layer name 'a/b' is not a module path"),
    (lambda: make(twice()), ValueError, "already carries a link: another ChainOptimizer owns this model"),
    # ranks and links
    (lambda: make(r=0), ValueError, "r=0 must be a positive integer"),
    (lambda: make(r=-2), ValueError, "r=-2 must be a positive integer"),
    (lambda: make(r=2.0), ValueError, "r=2.0 must be a positive integer"),
    (lambda: make(r=True), ValueError, "r=True must be a positive integer"),
    (lambda: make(r=[]), ValueError, r"r=\[\] must be"),
    (lambda: make(r=(4, 0)), ValueError, "r=0 must be a positive integer"),
    (
        lambda: make(r=7),
        ValueError,
        "r=7 is above the rank of layer 'first', whose weight is 6x6: choose",
    ),
    (lambda: make(r=(2, 9)), ValueError, "r=9 is above the rank"),
    (lambda: make(r=lambda link: 0), ValueError, "r=0 must be a positive integer"),
    (lambda: make(lora_alpha=0), ValueError, "lora_alpha=0 must be a positive number"),
    (lambda: make(lora_alpha=float("nan")), ValueError, "lora_alpha=nan"),
    (lambda: make(lora_dropout=1.0), ValueError, r"lora_dropout=1.0 must be a probability in \[0, 1\)"),
    (lambda: make(bias="all"), ValueError, "bias='all' is unknown: choose one of 'none', 'lora_only'"),
    (lambda: make(init="pissa"), ValueError, "init='pissa' is unknown"),
    (lambda: make(train="C"), ValueError, "train='C' is unknown"),
    (lambda: make(scaling="alpha"), ValueError, "scaling='alpha' is unknown"),
    (lambda: make(dtype=torch.int8), ValueError, "dtype=torch.int8 must be one of"),
    (lambda: make(modules_to_save="head"), TypeError, "modules_to_save='head' must be a list"),
    (lambda: make(modules_to_save=["haed"]), ValueError, "modules_to_save: no module is called 'haed'; .*head"),
    (
        lambda: make(modules_to_save=["first"]),
        ValueError,
        "holds the adapted layer 'first': train one or the other",
    ),
    (
        lambda: make(shared_head(), target_modules="all", modules_to_save=["lm_head"]),
        ValueError,
        "'lm_head' shares a weight with the adapted layer 'model.decoder.embed_tokens'",
    ),
    (lambda: make(rounding="up"), ValueError, "rounding='up' is unknown: choose 'auto' or one of"),
    (lambda: make(seed="x"), TypeError, "seed='x' must be an integer"),
    # base, model, policy
    (lambda: make(base=Adam(Net().parameters())), TypeError, r"is an optimizer instance: pass the class"),
    (lambda: make(base="adamw"), TypeError, "base='adamw' must be a torch.optim.Optimizer class or a callable"),
    (lambda: make(base=nn.Linear), TypeError, "must be a torch.optim.Optimizer class"),
    (lambda: make(base=lambda params, lr: params), TypeError, "returned list, not a torch.optim.Optimizer"),
    (
        lambda: make(base=lambda params, lr: Adam([nn.Parameter(torch.zeros(1))])),
        ValueError,
        "did not take the parameters it was given",
    ),
    (lambda: make(lr=-1.0), ValueError, "Invalid learning rate: -1.0"),
    (lambda: ChainOptimizer(Adam, list(Net().parameters()), NeverKnots()), TypeError, "must be an nn.Module"),
    (lambda: ChainOptimizer(Adam, Net(), None), TypeError, r"policy=None must be a KnotPolicy object.*NeverKnots\(\)"),
    (lambda: ChainOptimizer(Adam, Net(), StepKnots), TypeError, "must be a KnotPolicy object"),
    (lambda: ChainOptimizer(Adam, Net(), NeverKnots(), link={"r": 8}), TypeError, "must be a LinkConfig"),
    (lambda: make().on_knot(3), TypeError, "on_knot.*needs a callable"),
]


@pytest.mark.parametrize(("build", "error", "message"), TABLE)
def test_bad_input(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    "bad",
    [
        {"target_modules": ["first", "nope"]}, {"r": 7}, {"lr": -1.0}, {"modules_to_save": ["nope"]},
        {"rounding": "up"}, {"base": lambda params, lr: params}, {"base": torch.optim.SparseAdam},
        {"target_modules": ["first", "head"], "r": 4},
    ],
    ids=lambda bad: next(iter(bad)),
)  # fmt: skip
def test_a_refused_model_is_as_it_was(bad):
    model = Net()
    model.head.bias.requires_grad_(False)
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises((ValueError, TypeError)):
        make(model, **bad)
    assert [type(m) for m in model.modules()] == [Net, nn.Linear, nn.Linear, nn.Linear]
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert list(model.state_dict()) == list(before)
    make(model)  # and can be chained after all


@pytest.mark.parametrize("call", ["step", "tie", "finish"])
def test_nothing_goes_on_after_finish(call):
    model = Net()
    opt = make(model)
    train(opt, model, 2)
    opt.finish()
    with pytest.raises(RuntimeError, match=rf"{call}\(\) after finish\(\): this chain is complete"):
        getattr(opt, call)()


def test_finish_gives_back_what_was_frozen_before():
    model = Net()
    model.head.weight.requires_grad_(False)
    opt = make(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.lora_{f}" for layer in BODY for f in "AB"
    }
    opt.finish()
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"head.weight"}
    make(model).finish()  # a second chain may follow


@pytest.mark.parametrize(
    ("make_model", "targets", "expected"),
    [
        (Net, ["first"], ["first"]),
        (Net, r"(first|head)", ["first", "head"]),
        (Net, "all-linear", ["first", "second", "head"]),
        (tiny_opt, None, [f"model.decoder.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ("v_proj", "q_proj")]),
        (tiny_gpt2, None, [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]),
        (tiny_opt, ["layers.0.self_attn.q_proj"], ["model.decoder.layers.0.self_attn.q_proj"]),
        (
            tiny_opt,
            r".*layers\.1.*_proj",
            [f"model.decoder.layers.1.self_attn.{n}_proj" for n in ("k", "v", "q", "out")],
        ),
        (attention, "all-linear", ["1"]),
        (attention, "all", ["0.in_proj_weight", "0.out_proj", "1"]),
    ],
)
def test_targets(make_model, targets, expected):
    assert list(make(make_model(), target_modules=targets, r=2).live.layers) == expected


def test_all_linear_leaves_the_output_head_out():
    layers = make(tiny_opt(tie_word_embeddings=False), target_modules="all-linear", r=2).live.layers
    assert len(layers) == 12
    assert "lm_head" not in layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_factors_are_fp32_and_float64_on_a_float64_base_unless_asked(dtype):
    layer = make(Net(dtype=dtype)).live.layers["first"]
    assert layer.weight.dtype == dtype
    assert layer.lora_A.dtype == layer.lora_B.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    asked = make(Net(dtype=dtype), dtype=torch.bfloat16).live.layers["first"]
    assert asked.lora_A.dtype == torch.bfloat16
