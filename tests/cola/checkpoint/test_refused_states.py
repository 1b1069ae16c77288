"""Checkpoints and states that do not belong together, or are damaged, are refused before anything changes."""

import contextlib
import copy
import json

import pytest
import torch

from cola import Chain, ChainOptimizer, LinkConfig, NeverKnots
from cola.chain.packing import pack
from tests.cola.chain.json_places import places, replaced
from tests.cola.checkpoint.resumed import KNOT, made, same, undisturbed, wrap
from tests.models import BODY, Net, train


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
        lambda entry: entry["tensors"].pop("links/0/A:first"),
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
