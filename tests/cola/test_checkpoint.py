"""A resumed run is the run that never stopped, bit for bit; whatever does not belong together is refused."""

import contextlib
import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cola import Chain, ChainOptimizer, EpochKnots, LinkConfig, NeverKnots, PlateauKnots, StepKnots
from cola.packing import pack, unpack
from tests.models import BODY, Net, closure_steps, loss_of, tiny_gpt2, train

KNOT, TOTAL = 4, 11  # knots after steps 4 and 8, the last link tied at the end


class Dropped(Net):
    """With dropout, so that the random state matters."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.2, self.training))


CASES = {
    "fp32": {},
    "fp64": {"dtype": torch.float64},
    "bf16 stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic"},
    "bf16 nearest": {"dtype": torch.bfloat16, "rounding": "nearest"},
    "bf16 compensated": {"dtype": torch.bfloat16, "rounding": "compensated"},
    "fp16 stochastic": {"dtype": torch.float16, "rounding": "stochastic"},
    "fp32 compensated": {"rounding": "compensated"},
    "rank step-down": {"link": {"r": (3, 2, 1)}},
    "masked ranks": {"link": {"r": (3, 2, 1), "rank_change": "mask"}},
    "callable rank": {"link": {"r": lambda link: 3 - link % 2}},
    "biases": {"link": {"r": 2, "bias": "lora_only"}},
    "head": {"link": {"r": 2, "modules_to_save": ["head"]}},
    "only A": {"link": {"r": 2, "train": "A"}},
    "only B": {"link": {"r": 2, "train": "B"}},
    "dropout": {"model": Dropped, "link": {"r": 2, "lora_dropout": 0.3}},
    "plateau": {"policy": lambda: PlateauKnots(patience=0, window=2, threshold=0.5)},
    "either": {"policy": lambda: StepKnots(at=[KNOT]) | EpochKnots(at=[2], steps_per_epoch=KNOT)},
    "SGD": {"base": torch.optim.SGD, "kwargs": {"lr": 0.05, "momentum": 0.9}},
    "Adafactor": {"base": torch.optim.Adafactor, "kwargs": {"lr": 0.05}},
    "NAdam": {"base": torch.optim.NAdam, "kwargs": {"lr": 0.02}},
    "ASGD": {"base": torch.optim.ASGD, "kwargs": {"lr": 0.02}},
    "Rprop": {"base": torch.optim.Rprop, "kwargs": {"lr": 0.02}},
    "tensor lr": {"kwargs": {"lr": torch.tensor(0.02)}},
}
# the precisions at, before and after a knot; the rest after one, where everything is at stake
PRECISIONS = ("fp32", "bf16 stochastic", "bf16 compensated", "rank step-down")
STOPS = [(case, stop) for case in PRECISIONS for stop in (KNOT - 1, KNOT, KNOT + 1, 2 * KNOT)]
STOPS += [(case, KNOT + 1) for case in CASES if case not in PRECISIONS]


def wrap(model, case, **changes):
    case = {**CASES[case], **changes}
    link = LinkConfig(**{"r": 2, "target_modules": BODY, **case.get("link", {})})
    policy = case.get("policy", lambda: StepKnots(every=KNOT))()
    kwargs = copy.deepcopy(case.get("kwargs", {"lr": 0.02}))
    rounding, seed = case.get("rounding", "auto"), case.get("seed", 3)
    return ChainOptimizer(
        case.get("base", torch.optim.AdamW), model, policy, link=link, rounding=rounding, seed=seed, **kwargs
    )


def made(case, seed=0):
    dtype = CASES[case].get("dtype", torch.float32)
    return CASES[case].get("model", Net)(seed=seed, dtype=dtype), dtype


def same(one, other):
    """Equal keys, dtypes and bits."""
    a, b = dict(one), dict(other)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def undisturbed(case, steps):
    """Weights and chain of a run, and its model and optimizer after ``steps``."""
    model, dtype = made(case)
    opt = wrap(model, case)
    train(opt, model, steps, dtype=dtype)
    return model, opt, dtype


@pytest.mark.parametrize(("case", "stop"), STOPS)
def test_saved_and_loaded_goes_on_bit_for_bit(case, stop, tmp_path, restored_rng):
    torch.manual_seed(1)
    model, opt, dtype = undisturbed(case, stop)
    opt.save(tmp_path)
    losses = train(opt, model, TOTAL - stop, start=stop, dtype=dtype)
    torch.manual_seed(2)  # load brings the generator's state back
    resumed, _ = made(case)
    again = wrap(resumed, case)
    again.load(tmp_path)
    assert again.steps == stop
    assert train(again, resumed, TOTAL - stop, start=stop, dtype=dtype) == losses
    assert same(model.state_dict(), resumed.state_dict())
    assert [link.report.layers for link in opt.chain] == [link.report.layers for link in again.chain]
    opt.finish(), again.finish()
    assert same(model.state_dict(), resumed.state_dict())
    assert opt.chain.base == again.chain.base
    fresh, _ = made(case)
    again.chain.apply(fresh)
    assert same(model.state_dict(), fresh.state_dict())


@pytest.mark.parametrize(("case", "stop"), STOPS)
def test_state_dicts_go_on_bit_for_bit(case, stop, tmp_path, restored_rng):
    torch.manual_seed(1)
    model, opt, dtype = undisturbed(case, stop)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "rng": torch.get_rng_state()}, tmp_path / "x.pt")
    train(opt, model, TOTAL - stop, start=stop, dtype=dtype)
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    resumed, _ = made(case, seed=5)  # the model's own state dict brings the weights
    again = wrap(resumed, case)
    if CASES[case].get("link", {}).get("rank_change") == "mask" or callable(CASES[case].get("link", {}).get("r")):
        again.load_state_dict(saved["opt"])  # gives the factors the saved rank first
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    torch.set_rng_state(saved["rng"])
    train(again, resumed, TOTAL - stop, start=stop, dtype=dtype)
    opt.finish(), again.finish()
    assert same(model.state_dict(), resumed.state_dict())
    assert len(again.chain) == len(opt.chain)
    fresh, _ = made(case)
    if stop >= KNOT:  # before the first knot the base is whatever the weights are at that knot
        again.chain.apply(fresh)
        assert same(model.state_dict(), fresh.state_dict())


def test_lbfgs_state_with_lists_and_none_is_saved(tmp_path):
    def new():
        model = Net()
        link = LinkConfig(r=2, target_modules=BODY)
        return model, ChainOptimizer(
            torch.optim.LBFGS, model, StepKnots(every=5), link=link, lr=0.2, max_iter=3, history_size=4
        )

    model, opt = new()
    closure_steps(opt, model, 3)
    opt.save(tmp_path)
    closure_steps(opt, model, 4, start=3)
    resumed, again = new()
    again.load(tmp_path)
    closure_steps(again, resumed, 4, start=3)
    assert same(model.state_dict(), resumed.state_dict())


def test_state_in_another_dtype_than_the_parameter_is_not_cast(tmp_path):
    class Wide(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state.setdefault("sum", torch.zeros(p.shape, dtype=torch.float64)).add_(p.grad.double() / 3)
                    state["codes"] = (state["sum"] * 100).to(torch.int8)
            super().step()

    def new():
        model = Net()
        return model, ChainOptimizer(Wide, model, NeverKnots(), link=LinkConfig(r=2, target_modules=BODY), lr=0.1)

    model, opt = new()
    train(opt, model, 3)
    opt.save(tmp_path)
    _resumed, again = new()
    again.load(tmp_path)
    for one, other in zip(opt.live.adapters(), again.live.adapters()):
        assert same(opt.state[one], again.state[other])


def test_groups_of_the_callers_own_are_saved(tmp_path):
    def new():
        model, extra = Net(), nn.Parameter(torch.ones(3))
        opt = ChainOptimizer(
            torch.optim.Adam, model, StepKnots(every=2), link=LinkConfig(r=1, target_modules=BODY), lr=0.1
        )
        opt.add_param_group({"params": [extra], "lr": 0.3, "note": (1, "two", None, math.inf)})
        return model, opt, extra

    def run(opt, model, extra, start, steps):
        for step in range(start, start + steps):
            opt.zero_grad()
            (loss_of(model, step) + extra.square().sum()).backward()
            opt.step()

    model, opt, extra = new()
    run(opt, model, extra, 0, 3)
    opt.save(tmp_path)
    run(opt, model, extra, 3, 3)
    resumed, again, other = new()
    again.load(tmp_path)
    assert again.param_groups[-1]["note"] == (1, "two", None, math.inf)
    run(again, resumed, other, 3, 3)
    assert same(model.state_dict(), resumed.state_dict())
    assert torch.equal(extra, other)


def test_a_scheduler_goes_on(tmp_path):
    def new():
        model = Net()
        opt = wrap(model, "fp32")
        return model, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=TOTAL)

    def run(model, opt, scheduler, start, steps):
        for step in range(start, start + steps):
            train(opt, model, 1, start=step)
            scheduler.step()

    model, opt, scheduler = new()
    run(model, opt, scheduler, 0, 5)
    opt.save(tmp_path)
    kept = scheduler.state_dict()
    run(model, opt, scheduler, 5, 5)
    resumed, again, other = new()
    again.load(tmp_path)
    other.load_state_dict(kept)
    run(resumed, again, other, 5, 5)
    assert same(model.state_dict(), resumed.state_dict())


def test_conv1d_layers_are_rebuilt(tmp_path):
    def run(model, opt, steps):
        ids = torch.arange(12).view(2, 6)
        for _ in range(steps):
            opt.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            opt.step()

    model, resumed = tiny_gpt2(), tiny_gpt2()
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(r=2), lr=0.05)
    run(model, opt, 5)
    opt.save(tmp_path)
    run(model, opt, 2)
    again = ChainOptimizer(torch.optim.AdamW, resumed, StepKnots(every=2), link=LinkConfig(r=2), lr=0.05)
    again.load(tmp_path)
    run(resumed, again, 2)
    assert same(model.state_dict(), resumed.state_dict())
    assert all(layer.transposed for layer in again.chain.base.layers.values())


def test_random_states_are_left_alone_on_request(tmp_path, restored_rng):
    torch.manual_seed(1)
    _model, opt, _ = undisturbed("fp32", 2)
    opt.save(tmp_path)
    other = wrap(Net(), "fp32")
    torch.manual_seed(9)
    expected = torch.get_rng_state()
    other.load(tmp_path, rng=False)
    assert torch.equal(torch.get_rng_state(), expected)


# what is refused


def everything(opt):
    """The state that must not change when something is refused."""
    state = opt.state_dict()
    tensors = {}
    packed = pack({k: v for k, v in state.items() if k != "cola"}, "s", tensors)
    tensors.update({f"m/{k}": v.clone() for k, v in opt.model.state_dict().items()})
    return packed, {k: v.clone() for k, v in tensors.items()}, repr(opt.chain), torch.get_rng_state()


REFUSALS = {
    "wrong base": (lambda: wrap(Net(seed=1), "fp32"), r"wrong base: the weight of layer 'first' has other values"),
    "wrong dtype": (lambda: wrap(Net(dtype=torch.float64), "fp32"), r"wrong base: .*float64.*float32"),
    "wrong rank": (lambda: wrap(Net(), "fp32", link={"r": 1}), r"r: saved \[2\], here \[1\]"),
    "wrong layers": (
        lambda: wrap(Net(), "fp32", link={"target_modules": ["first"]}),
        r"layers differs \(second: saved \[6, 6\], here None\)",
    ),
    "seed": (lambda: wrap(Net(), "fp32", seed=4), r"seed differs \(saved 3, here 4\)"),
    "rounding": (lambda: wrap(Net(), "fp32", rounding="stochastic"), r"rounding differs"),
    "alpha": (lambda: wrap(Net(), "fp32", link={"lora_alpha": 4}), r"lora_alpha: saved 16.0, here 4.0"),
    "policy": (lambda: wrap(Net(), "fp32", policy=NeverKnots), r"resume with the policy of the saved run"),
    "optimizer": (
        lambda: wrap(Net(), "fp32", base=torch.optim.SGD),
        r"base optimizer is torch.AdamW, here it is torch.SGD",
    ),
    "biases": (lambda: wrap(Net(), "fp32", link={"bias": "lora_only"}), r"bias: saved 'none', here 'lora_only'"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_load_refuses_and_changes_nothing(what, tmp_path):
    _, opt, _ = undisturbed("fp32", KNOT + 1)
    opt.save(tmp_path)
    make, message = REFUSALS[what]
    other = make()
    before = everything(other)
    with pytest.raises(ValueError, match=message):
        other.load(tmp_path)
    unchanged(before, everything(other))


def unchanged(before, after):
    assert before[0] == after[0]
    assert same(before[1], after[1])
    assert before[2] == after[2]
    assert torch.equal(before[3], after[3])


def test_load_refuses_a_missing_link_and_changes_nothing(tmp_path):
    _, opt, _ = undisturbed("fp32", 2 * KNOT)
    opt.save(tmp_path)
    next(tmp_path.glob("link-00000-*")).unlink()
    other = wrap(Net(), "fp32")
    before = everything(other)
    with pytest.raises(ValueError, match=r"link-00000-\w+\.safetensors is missing"):
        other.load(tmp_path)
    unchanged(before, everything(other))


def test_load_refuses_a_run_that_has_tied_a_knot(tmp_path):
    _, opt, _ = undisturbed("fp32", KNOT)
    opt.save(tmp_path)
    with pytest.raises(RuntimeError, match="untouched base"):
        opt.load(tmp_path)


def test_save_refuses_a_chain_without_its_links(tmp_path):
    opt = ChainOptimizer(
        torch.optim.SGD, Net(), NeverKnots(), link=LinkConfig(r=1, target_modules=BODY), keep_links=False, lr=0.1
    )
    with pytest.raises(RuntimeError, match="keep_links=False"):
        opt.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_save_refuses_state_that_only_pickle_could_keep(tmp_path):
    _, opt, _ = undisturbed("fp32", 1)
    opt.save(tmp_path)
    kept = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    opt.param_groups[0]["hook"] = print
    with pytest.raises(TypeError, match=r"param_groups/0/hook is a builtin_function_or_method"):
        opt.save(tmp_path)
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == kept


def test_a_state_without_its_links_trains_on_and_refuses_export(tmp_path):
    """What distributed checkpointing leaves of a state dict: no top-level key of ours."""
    model, opt, _ = undisturbed("fp32", KNOT + 1)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    del state["cola"]
    resumed = Net()
    again = wrap(resumed, "fp32")
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    train(opt, model, 5, start=KNOT + 1), train(again, resumed, 5, start=KNOT + 1)
    opt.finish(), again.finish()
    assert same(model.state_dict(), resumed.state_dict())
    assert again.chain.missing == 1
    for refused in (
        lambda: again.chain.apply(Net()),
        lambda: again.chain.to_peft(tmp_path / "adapter"),
        lambda: again.chain.effective_rank(),
        lambda: again.chain.delta("first"),
    ):
        with pytest.raises(RuntimeError, match="lacks its first 1"):
            refused()
    again.chain.save(tmp_path / "chain")  # the later links are kept all the same
    assert Chain.load(tmp_path / "chain").missing == 1


@pytest.mark.parametrize("dropped", [True, False])
def test_a_state_on_weights_without_the_links_is_found_at_the_first_step(dropped):
    """What every peer lets pass: the optimizer is resumed, the tied weights are not."""
    model, opt, _ = undisturbed("fp32", KNOT + 1)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    if dropped:
        del state["cola"]
    resumed = Net()
    again = wrap(resumed, "fp32")
    again.load_state_dict(state)
    live_alone = {name: value for name, value in weights.items() if "lora_" in name}
    resumed.load_state_dict(live_alone, strict=False)
    before = copy.deepcopy(resumed.state_dict())
    for refused in (lambda: train(again, resumed, 1), again.tie, again.finish):
        with pytest.raises(RuntimeError, match="load the model's own state dict too"):
            refused()
    assert same(before, resumed.state_dict())
    resumed.load_state_dict(weights)
    train(opt, model, 5, start=KNOT + 1), train(again, resumed, 5, start=KNOT + 1)
    assert same(model.state_dict(), resumed.state_dict())


def test_a_state_of_the_first_link_takes_any_base():
    """Before the first knot nothing is tied, and a framework may load and save before the weights arrive."""
    _, opt, _ = undisturbed("fp32", KNOT - 2)
    resumed = Net(seed=4)
    again = wrap(resumed, "fp32")
    again.load_state_dict(opt.state_dict())
    train(again, resumed, 5)


def test_compensated_rounding_without_its_residuals_is_refused():
    _model, opt, _ = undisturbed("bf16 compensated", KNOT + 1)
    state = copy.deepcopy(opt.state_dict())
    del state["cola"]
    other = wrap(made("bf16 compensated")[0], "bf16 compensated")
    before = everything(other)
    with pytest.raises(ValueError, match=r"needs the residual of layer 'first'"):
        other.load_state_dict(state)
    unchanged(before, everything(other))


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.pop("text"),
        lambda entry: entry.update(text="{"),
        lambda entry: entry["links"].pop("0/A:first"),
        lambda entry: entry.update(text=json.dumps({**json.loads(entry["text"]), "links": []})),
        lambda entry: entry.update(text=json.dumps({**json.loads(entry["text"]), "version": 99})),
    ],
)
def test_a_damaged_entry_is_refused_before_anything_changes(damage):
    _, opt, _ = undisturbed("fp32", KNOT + 1)
    state = copy.deepcopy(opt.state_dict())
    damage(state["cola"])
    other = wrap(Net(), "fp32")
    before = everything(other)
    with pytest.raises(ValueError, match=r"'cola' entry|a link is missing"):
        other.load_state_dict(state)
    unchanged(before, everything(other))


JUNK = (None, True, -1, 10**400, 0.5, "x", [], [None], {}, {"a": None})


def places(value, path=()):
    """Where in nested JSON something could be put in the place of what is there."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*path, key))


def replaced(value, path, junk):
    if not path:
        return junk
    copied = copy.copy(value)
    copied[path[0]] = replaced(value[path[0]], path[1:], junk)
    return copied


@pytest.mark.parametrize("stop", [1, KNOT + 1])
def test_counters_with_anything_in_the_place_of_anything_are_refused_or_harmless(stop):
    """No other error than ValueError, and where it is raised nothing has changed."""
    model, opt, _ = undisturbed("fp32", stop)
    state, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    counters = json.loads(state["param_groups"][0]["cola"])
    for path in places(counters):
        for junk in JUNK:
            fresh = Net()
            other = wrap(fresh, "fp32")
            before = everything(other)
            state["param_groups"][0]["cola"] = json.dumps(replaced(counters, path, junk))
            try:
                other.load_state_dict(state)
            except ValueError:
                unchanged(before, everything(other))
            else:  # numbers and names that only say how far the run was
                fresh.load_state_dict(weights)
                with contextlib.suppress(RuntimeError):  # of the step that compares weights and links
                    train(other, fresh, 1)
                other.state_dict()


# the encoding of an optimizer's state

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.lists(st.floats(width=32), max_size=3).map(torch.tensor),
)  # fmt: skip
KEYS = st.one_of(st.text(max_size=4), st.integers(), st.tuples(st.integers(), st.text(max_size=2)))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(st.sampled_from(["float", "tensor", "tuple", "dict"]), inner, max_size=2),
    ),
    max_leaves=8,
)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    return a == b or (a != a and b != b)


@given(VALUES)
def test_packing_round_trips_through_json(value):
    tensors = {}
    text = json.dumps(pack(value, "value", tensors), allow_nan=False)
    assert equal(unpack(json.loads(text), tensors), value)


@pytest.mark.parametrize("keys", [(0, "0"), ("a/b", "a"), ("x~1", "x")], ids=str)
def test_packing_keeps_tensors_apart_whose_keys_read_alike(keys):
    one, two = torch.zeros(1), torch.ones(1)
    value = {keys[0]: one, keys[1]: {"b": two} if keys[1] == "a" else two}
    tensors = {}
    assert equal(unpack(json.loads(json.dumps(pack(value, "s", tensors))), tensors), value)


def test_packing_names_what_it_cannot_keep():
    with pytest.raises(TypeError, match=r"state/3/hook is a function"):
        pack({3: {"hook": lambda: 0}}, "state", {})


def test_what_distributed_checkpointing_gives_back_goes_on():
    """torch's own functions, flattened names and probe step included."""
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    model, opt, _ = undisturbed("fp32", KNOT)
    weights = copy.deepcopy(get_model_state_dict(model))
    state = copy.deepcopy(get_optimizer_state_dict(model, opt))
    train(opt, model, 4, start=KNOT)
    resumed = Net()
    again = wrap(resumed, "fp32")
    set_model_state_dict(resumed, weights)
    set_optimizer_state_dict(resumed, again, state)
    assert again.steps == KNOT
    train(again, resumed, 4, start=KNOT)
    assert same(model.state_dict(), resumed.state_dict())
    assert len(opt.chain) == 2
    assert (again.chain.missing, len(again.chain)) == (1, 1)


def test_a_model_with_pefts_own_layers_is_resumed(tmp_path, restored_rng):
    peft = pytest.importorskip("peft")
    ids = torch.arange(24).view(2, 12)

    def new(seed):
        torch.manual_seed(seed)  # PEFT draws the first link from the global generator
        config = peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(tiny_gpt2(), config)
        return model, ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=3), lr=0.05)

    def run(model, opt, steps):
        for _ in range(steps):
            opt.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            opt.step()

    model, opt = new(0)
    run(model, opt, 2)
    opt.save(tmp_path / "early")
    run(model, opt, 3)
    opt.save(tmp_path / "late")
    run(model, opt, 3)
    for name, steps in (("early", 6), ("late", 3)):
        resumed, again = new(1)
        again.load(tmp_path / name)
        run(resumed, again, steps)
        assert same(model.state_dict(), resumed.state_dict())
