"""Torch's global defaults and ambient modes change nothing: equal keys give equal factors, and a chain equal bits."""

import contextlib
import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from cola import Chain, ChainOptimizer, LinkConfig, StepKnots
from cola.knot.tie import tie_
from cola.lora.init import INITS
from tests.models import BODY, Net, batch, draw


@contextlib.contextmanager
def default_device(device):
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


DEFAULTS = {
    "device meta": lambda: default_device("meta"),
    "device cpu": lambda: default_device("cpu"),
    "within torch.device": lambda: torch.device("meta"),
    "dtype float64": lambda: default_dtype(torch.float64),
    "dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "dtype float16": lambda: default_dtype(torch.float16),
    "deterministic": deterministic,
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
}
#: those under which torch itself cannot train, or trains otherwise
AROUND_CALLS = {
    **DEFAULTS,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "disabled gradients": lambda: torch.set_grad_enabled(False),
}

CONFIGS = {
    "gaussian": {},
    "kaiming, alpha/r": {"init": "kaiming", "scaling": "alpha/r"},
    "orthogonal, masked": {"init": "orthogonal", "rank_change": "mask"},
    "selector, only B": {"init": "selector", "train": "B"},
    "only A": {"train": "A"},
    "dropout": {"lora_dropout": 0.3},
    "biases and a head": {"bias": "lora_only", "modules_to_save": ["head"]},
}
ROUNDINGS = {"fp32": (torch.float32, "auto"), "bf16": (torch.bfloat16, "auto"), "kept": (torch.bfloat16, "compensated")}


def step(opt, model, number, dtype):
    """Everything explicit, so that no default reaches the test's own data; the loss is told as a number."""
    opt.zero_grad()
    x, y = (t.to(dtype) for t in data(number))
    loss = (model(x) - y).square().mean()
    loss.backward()
    opt.observe(loss.item())
    opt.step()


BATCHES = {number: batch(number) for number in range(12)}


def data(number):
    return BATCHES[number]


def whole_chain(directory, link, dtype, rounding, around=contextlib.nullcontext, calls=contextlib.nullcontext):
    """Knots, save, load, finish, apply and export; ``around`` all of it, ``calls`` around what is not training."""
    base = Net(dtype=dtype)
    torch.manual_seed(5)  # of dropout

    def wrap(model):
        # momentum without buffers of torch's own defaults: Adam counts its steps on the default device
        return ChainOptimizer(
            torch.optim.SGD, model, StepKnots(every=3), link=link, rounding=rounding, lr=0.1, momentum=0.9
        )

    with around():
        model = copy.deepcopy(base)
        with calls():
            opt = wrap(model)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        for number in range(4):
            step(opt, model, number, dtype)
        resumed = copy.deepcopy(base)
        with calls():
            opt.save(directory / "run")
            again = wrap(resumed)
            again.load(directory / "run")
        for number in range(4, 7):
            step(again, resumed, number, dtype)
        third = copy.deepcopy(base)
        with calls():
            state = again.state_dict()
        state = copy.deepcopy(state)
        with calls():
            other = wrap(third)
            other.load_state_dict(state)
            third.load_state_dict(resumed.state_dict())
        for number in range(7, 10):
            step(other, third, number, dtype)
        knots = contextlib.nullcontext if calls is torch.inference_mode else calls  # it refuses knots
        with knots():
            other.tie()
        with calls():
            other.undo(base)
        step(other, third, 10, dtype)
        with knots():
            other.finish()
        applied = copy.deepcopy(base)
        with calls():
            other.chain.save(directory / "chain")
            chain = Chain.load(directory / "chain")
            chain.apply(applied)
            chain.to_peft(directory / "peft")
            chain.to_peft(directory / "small", r=1)
            rank = chain.effective_rank()
        reports = [(r.index, r.step, r.rank, r.delta_norm, r.lost_norm, r.loss) for r in (k.report for k in chain)]
        tensors = {
            **{f"start {n}": t for n, t in start.items()},
            **{f"end {n}": t.detach().clone() for n, t in third.state_dict().items()},
            **{f"applied {n}": t.detach().clone() for n, t in applied.state_dict().items()},
        }
    for name in ("peft", "small"):
        tensors.update({f"{name} {n}": t for n, t in load_file(directory / name / "adapter_model.safetensors").items()})
    return tensors, reports, json.dumps(rank, default=float)


def agree(one, other):
    assert one[1:] == other[1:]
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        assert tensor.dtype == other[0][name].dtype, name
        assert torch.equal(tensor, other[0][name]), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The chains without any default changed, each made once."""
    made = {}

    def of(config, kind):
        if (config, kind) not in made:
            made[config, kind] = whole_chain(tmp_path_factory.mktemp("plain"), link_of(config), *ROUNDINGS[kind])
        return made[config, kind]

    return of


def link_of(config):
    return LinkConfig(**{"r": (3, 2, 1), "lora_alpha": 3, "target_modules": BODY, **CONFIGS[config]})


#: every configuration under the two that reach tensors made without a word, and two of them under all
TABLE = [
    *((default, "biases and a head", "fp32") for default in DEFAULTS),
    *((default, "gaussian", "kept") for default in DEFAULTS),
    *((default, config, "fp32") for config in CONFIGS for default in ("device meta", "dtype bfloat16")),
    ("dtype float64", "gaussian", "bf16"),
]


@pytest.mark.parametrize(("default", "config", "kind"), TABLE)
def test_a_whole_chain_is_the_same_under_any_default(tmp_path, plain, default, config, kind):
    agree(whole_chain(tmp_path, link_of(config), *ROUNDINGS[kind], around=DEFAULTS[default]), plain(config, kind))


@pytest.mark.parametrize("mode", AROUND_CALLS)
@pytest.mark.parametrize(("config", "kind"), [("biases and a head", "fp32"), ("gaussian", "kept")])
def test_a_mode_around_the_calls_that_do_not_train_changes_nothing(tmp_path, plain, mode, config, kind):
    agree(whole_chain(tmp_path, link_of(config), *ROUNDINGS[kind], calls=AROUND_CALLS[mode]), plain(config, kind))


@pytest.mark.parametrize("mode", AROUND_CALLS)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("train", ["both", "A"])
def test_equal_keys_give_equal_factors(mode, init, train):
    config = LinkConfig(r=3, init=init, train=train)
    wanted = draw(config, (5, 7), seed=1, link=2, layer="x")
    with AROUND_CALLS[mode]():
        found = draw(config, (5, 7), seed=1, link=2, layer="x")
    for one, other in zip(wanted, found):
        assert (one.dtype, one.device, one.is_inference()) == (other.dtype, other.device, other.is_inference())
        assert torch.equal(one, other)


@pytest.mark.parametrize("default", ["dtype float64", "dtype bfloat16", "dtype float16", "device meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_stochastic_tie_rounds_equally_under_any_default(default, dtype):
    """Integers times a number take the default dtype, which fp32, fp64 and the subnormals of fp16 would be rounded by.

    The update is below the weights' resolution, so that chance decides nearly every entry.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator).mul(2.0**-16).to(dtype)
    left, right = (torch.randn(shape, generator=generator) for shape in ((64, 2), (2, 64)))
    scaling = torch.finfo(dtype).eps * 2.0**-18
    tied = []
    for around in (contextlib.nullcontext, DEFAULTS[default]):
        copied = weight.clone()
        with around():
            tie_(copied, left, right, scaling, rounding="stochastic", seed=3)
        tied.append(copied)
    assert torch.equal(*tied)
    assert not torch.equal(tied[0], weight)
