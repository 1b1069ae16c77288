"""Every kind of layer that reads its weight keeps the contracts of a chain: ties, checkpoints, copies, undoing."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cola import Chain, ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from tests.kinds import KINDS, Experts, Scaled

pytestmark = pytest.mark.numerics

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDINGS = ["nearest", "stochastic", "compensated"]


def chained(model, policy=None, options=None, **link):
    return ChainOptimizer(
        torch.optim.AdamW, model, policy or NeverKnots(),
        link=LinkConfig(**{"r": 2, "target_modules": "all", **link}), lr=0.02, **(options or {}),
    )  # fmt: skip


def train(opt, model, kind, steps, start=0, dtype=torch.float32):
    for step in range(start, start + steps):
        opt.zero_grad()
        (model(kind.inputs(step, dtype)).float() - 1).square().mean().backward()
        opt.step()


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


# a tie changes nothing that can be seen

LAYERS = {
    **{
        f"experts{' in×out' * turned} {read}": lambda m, n, g, read=read, turned=turned, **_: Experts(
            read, turned, *((8 * n, 8 * m) if read == "grouped" else (n, m))
        )
        for read in ("one by one", "gathered", "grouped")
        for turned in (False, True)
    },
    "embedding": lambda m, n, **_: nn.Embedding(m, n),
    "linear of one's own": lambda m, n, **_: Scaled(n, m),
    **{
        f"conv{d}d": lambda m, n, d=d, **o: getattr(nn, f"Conv{d}d")(
            n * o["g"], m * o["g"], o["kernel"], stride=o["stride"], dilation=o["stride"], groups=o["g"],
            padding=o["kernel"] // 2, padding_mode=o["mode"], bias=o["kernel"] > 1,
        )
        for d in (1, 2, 3)
    },
}  # fmt: skip


def made(name, dtype, seed, **sizes):
    """A layer in a model, with random weights, and inputs for it."""
    layer, g = LAYERS[name](**sizes), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    if isinstance(layer, nn.Conv2d) and sizes["last"]:
        layer = layer.to(memory_format=torch.channels_last)
    if isinstance(layer, nn.Embedding):
        return nn.Sequential(layer).to(dtype), torch.randint(layer.num_embeddings, (2, 5), generator=g), g
    if isinstance(layer, nn.modules.conv._ConvNd):
        shape = (2, layer.in_channels, *[6] * len(layer.kernel_size))
    else:
        shape = (
            7,
            layer.proj.shape[1 if layer.is_transposed else 2] if isinstance(layer, Experts) else layer.in_features,
        )
    return nn.Sequential(layer).to(dtype), torch.randn(shape, generator=g).to(dtype), g


def sizes_of_sums(model, base, x):
    """What the layer computes from absolute values throughout, in fp64."""
    (path, layer), absolute = next(iter(model.items())), copy.deepcopy(base).double()
    left, right = layer.kind.sides(layer.holder, layer.lora_A.detach(), layer.lora_B.detach())
    delta = layer.scaling * left.double().abs() @ right.double().abs()
    with torch.no_grad():
        for name, p in absolute.named_parameters():
            p.copy_(p.abs() + (delta.reshape(p.shape) if name in (path, f"{path}.weight") else 0))
    if isinstance(absolute[0], Experts):
        absolute[0].read = "one by one"  # torch has no grouped product in fp64
    return absolute(x.double().abs() if x.is_floating_point() else x), layer.kind.shape(layer.holder)[-1]


@pytest.mark.parametrize(
    ("name", "dtype"),
    # torch has no grouped product in fp64
    [(name, dtype) for name in LAYERS for dtype in DTYPES if not ("grouped" in name and dtype == torch.float64)],
    ids=str,
)
@settings(max_examples=10)
@given(
    m=st.integers(1, 6), n=st.integers(1, 6), r=st.integers(1, 3), g=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3), stride=st.integers(1, 2), mode=st.sampled_from(["zeros", "circular", "reflect"]),
    last=st.booleans(), rounding=st.sampled_from(ROUNDINGS), size=st.sampled_from([1e-3, 0.1]),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_outputs_before_and_after_a_tie_agree(name, dtype, r, rounding, size, seed, **sizes):
    base, x, g = made(name, dtype, seed, **sizes)
    model = copy.deepcopy(base)
    path = "0.proj" if "experts" in name else "0"
    shape = [*model[0].proj.shape[1:]] if "experts" in name else [*model[0].weight.flatten(1).shape]
    opt = chained(
        model, options={"rounding": rounding, "seed": seed}, r=min(r, *shape), init="two-sided", target_modules="all"
    )
    layer = opt.live.layers[path]
    model.eval()
    with torch.no_grad():  # another link than it began with
        for factor in (layer.lora_A, layer.lora_B):
            factor.add_(torch.randn(factor.shape, generator=g) * size)
        base[0].load_state_dict({k: v for k, v in model[0].state_dict().items() if "lora" not in k})
        sums, n = sizes_of_sums(opt.live.layers, base, x)
        before = model(x)
        opt.tie()
        after = model(x)
    # γ_k with k roundings, as in test_equivalence.py; a tie of the next link's start, which is subtracted, rounds too
    bound = (2 * n + r + 8) * torch.finfo(dtype).eps * (sums + 1) + torch.finfo(dtype).smallest_normal
    assert ((before.double() - after.double()).abs() <= bound).all()


#: what may be said of a run of each kind; each is trained over two links
OPTIONS = {
    "plain": {},
    "smaller ranks": {"r": (2, 1)},
    "masked ranks": {"r": (2, 1), "rank_change": "mask"},
    "two-sided": {"init": "two-sided"},
    "B on selected inputs": {"init": "selector", "train": "B", "reset": "transport"},
    "A alone": {"train": "A"},
    "orthogonal, transported": {"init": "orthogonal", "reset": "transport"},
    "a kept state": {"reset": "keep"},
    "compensated": {"rounding": "compensated", "dtype": torch.bfloat16},
    "stochastic": {"rounding": "stochastic", "dtype": torch.float16},
}
CASES = [pytest.param(kind, option, id=f"{kind}-{option}") for kind in KINDS for option in OPTIONS]


def begun(kind, option, at=(2,)):
    """A fresh model and its chain; and the dtype."""
    own = dict(OPTIONS[option])
    dtype = own.pop("dtype", torch.float32)
    options = {name: own.pop(name) for name in ("reset", "rounding") if name in own}
    model = KINDS[kind].model(dtype)
    return model, chained(model, StepKnots(at=at), options, **own), dtype


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_a_chain_holds(kind, option, tmp_path):
    model, opt, dtype = begun(kind, option)
    base = KINDS[kind].model(dtype)
    assert tuple(opt.live.layers) == KINDS[kind].layers
    train(opt, model, KINDS[kind], 4, dtype=dtype)
    assert all(p.grad is not None and p.grad.any() for p in opt.live.adapters())
    model.eval()
    with torch.no_grad():
        live = model(KINDS[kind].inputs(9, dtype)).double()
        opt.finish()
        tied = model(KINDS[kind].inputs(9, dtype)).double()
    # one rounding of each weight and a few of each activation, in at most four layers
    assert (live - tied).abs().max() <= 16 * torch.finfo(dtype).eps * max(1, tied.abs().max())
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert all(p.requires_grad for p in model.parameters())
    assert not all(map(torch.equal, model.state_dict().values(), base.state_dict().values()))
    opt.chain.save(tmp_path)
    again = Chain.load(tmp_path)
    again.apply(base)
    same(model, base)
    for _ in range(2):
        again.undo(base, KINDS[kind].model(dtype))
    same(base, KINDS[kind].model(dtype))


RESUMED = ["plain", "smaller ranks", "masked ranks", "two-sided", "B on selected inputs", "compensated"]


#: the ways of reading experts differ in nothing that is saved
SAVED = [kind for kind in KINDS if "gathered" not in kind and "grouped" not in kind]


@pytest.mark.parametrize(
    ("way", "option"),
    [("directory", option) for option in RESUMED] + [("state dicts", option) for option in RESUMED[:2]],
)
@pytest.mark.parametrize("kind", SAVED)
def test_a_resumed_run_goes_on_bit_for_bit(kind, option, way, tmp_path):
    """In the middle of the second link."""
    at = (2, 5)
    model, opt, dtype = begun(kind, option, at)
    train(opt, model, KINDS[kind], 4, dtype=dtype)
    file = io.BytesIO()
    if way == "directory":
        opt.save(tmp_path)
    else:
        torch.save((model.state_dict(), opt.state_dict()), file)
    train(opt, model, KINDS[kind], 2, 4, dtype)
    fresh, second, _ = begun(kind, option, at)
    if way == "directory":
        second.load(tmp_path)
    else:
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        fresh.load_state_dict(weights)
        second.load_state_dict(state)
    train(second, fresh, KINDS[kind], 2, 4, dtype)
    same(model, fresh)
    opt.finish()
    second.finish()
    same(model, fresh)


@pytest.fixture(params=KINDS)
def running(request):
    """A run in its second link."""
    model, opt, _ = begun(request.param, "plain")
    train(opt, model, KINDS[request.param], 3)
    return model.eval(), opt, KINDS[request.param]


def test_merged_is_the_model_with_its_link_and_puts_it_back(running):
    model, opt, kind = running
    before, weights = model(kind.inputs(9)), copy.deepcopy(model.state_dict())
    with opt.merged():
        assert list(model.state_dict()) == list(kind.model().state_dict())
        assert [type(m) for m in model.modules()] == [type(m) for m in kind.model().modules()]
        torch.testing.assert_close(model(kind.inputs(9)), before)
    assert torch.equal(model(kind.inputs(9)), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    model.train()
    train(opt, model, kind, 2, 3)
    opt.finish()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_carries_the_link_of_its_own(running, copied):
    model, opt, kind = running
    twin = copied(model)
    before = twin(kind.inputs(9))
    torch.testing.assert_close(before, model(kind.inputs(9)), rtol=0, atol=0)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    model.train()
    train(opt, model, kind, 3, 3)
    opt.finish()
    assert torch.equal(twin(kind.inputs(9)), before)


def test_undo_takes_the_live_link_and_the_last_tie_back(running):
    model, opt, kind = running
    opt.undo(kind.model())
    assert len(opt.chain) == 0
    model.train()
    train(opt, model, kind, 2)
    opt.finish()


def test_autocast_trains_every_kind(running):
    model, opt, kind = running
    opt.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(kind.inputs(4))
    plain = model(kind.inputs(4))
    # bf16 rounds weights, inputs and results, in at most four layers
    assert (out.float() - plain).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps * max(1, plain.abs().max())
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in opt.live.adapters())


def test_dropout_is_for_training_alone(running):
    model, opt, kind = running
    opt.finish()
    if any("attn" in path or "attention" in path for path in kind.layers):
        with pytest.raises(ValueError, match=r"lora_dropout=0.5 has no effect on .*nn.MultiheadAttention multiplies"):
            chained(model, lora_dropout=0.5)
        return
    chained(model, lora_dropout=0.5, init="two-sided")
    x = kind.inputs()
    model.train()
    dropped = not torch.equal(model(x), model(x))
    # ids cannot be dropped; the output head on the embedding's matrix has inputs that can
    assert dropped == (not kind.looks_up or len(kind.layers) > 1)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_the_fast_path_of_an_encoder_layer_is_not_taken_past_its_link():
    kind = KINDS["encoder layer"]
    model, opt, _ = begun("encoder layer", "plain")
    train(opt, model, kind, 3)
    model.train()
    expected = model(kind.inputs())
    model.eval()
    with torch.inference_mode():
        assert (model(kind.inputs()) - expected).abs().max() <= 1e-5
    opt.finish()
    with torch.inference_mode():
        assert (model(kind.inputs()) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("r", [2, (2, 1), lambda link: 2])
def test_selectors_pass_over_the_row_of_padding(r):
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=1), nn.Linear(4, 5))
    model[1].weight = model[0].weight
    opt = chained(model, NeverKnots(), r=r, init="selector", train="B")
    met = []
    for _ in range(4):
        met += opt.live.factor("0").A.argmax(1).tolist()
        assert (opt.live.factor("0").A.sum(1) == 1).all()
        opt.tie()
    assert 1 not in met
    assert {*met} == {0, 2, 3, 4}
    with pytest.raises(ValueError, match="r=5 is above the rank of layer '0'"):
        chained(nn.Sequential(nn.Embedding(5, 6, padding_idx=1)), NeverKnots(), r=5, init="selector", train="B")


@pytest.mark.parametrize(
    "option",
    [{"init": "two-sided"}, {"init": "orthogonal", "train": "B"}, {"init": "selector", "train": "B"}, {}],
)
def test_the_row_of_padding_stays(option):
    kind = KINDS["embedding"]
    model = kind.model()
    row = model[0].weight[1].clone()
    opt = chained(model, StepKnots(at=[2]), **option)
    for _ in range(4):
        opt.zero_grad()
        model(torch.tensor([[0, 1, 2, 1]])).square().sum().backward()
        opt.step()
    opt.finish()
    assert torch.equal(model[0].weight[1], row)
    assert not torch.equal(model[0].weight[2], kind.model()[0].weight[2])
