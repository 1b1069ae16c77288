"""State dicts, the frameworks' way to save a chain: through files and distributed checkpointing, in either order."""

import copy
import io

import pytest
import torch

from cola import Chain, LinkConfig, NeverKnots, PlateauKnots, StepKnots
from cola.common.version import FORMAT
from tests.cola.chain.chained import chained
from tests.models import BODY, Net, train


def test_distributed_checkpointing_at_a_knot():
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    (model, opt), (plain, other) = chained(), chained()
    train(opt, model, 3), train(other, plain, 3)
    assert not opt.state  # right after a knot
    saved = get_optimizer_state_dict(model, opt)
    weights = {k: v.clone() for k, v in get_model_state_dict(model).items()}
    resumed, again = chained()
    set_model_state_dict(resumed, weights)
    set_optimizer_state_dict(resumed, again, saved)
    assert (again.steps, again.live.index) == (3, 1)
    for m, o in ((model, opt), (resumed, again)):
        train(o, m, 4, start=3)
    train(other, plain, 4, start=3)
    for p, q, r in zip(model.parameters(), resumed.parameters(), plain.parameters()):
        assert torch.equal(p, r)
        assert torch.equal(q, r)


@pytest.mark.parametrize("chain_first", [True, False])
def test_links_that_a_framework_drops_come_back_by_the_chains_own_state(tmp_path, chain_first):
    """As torch.distributed.checkpoint loads it: into place, whatever number of links was there before."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, opt = chained()
    train(opt, model, 7)
    states = {"optimizer": get_optimizer_state_dict(model, opt), "model": model.state_dict(), "chain": opt.chain}
    dcp.save(states, checkpoint_id=tmp_path / "dcp", no_dist=True)
    resumed, again = chained()
    states = {"optimizer": get_optimizer_state_dict(resumed, again), "model": resumed.state_dict()}
    if chain_first:
        states["chain"] = again.chain
    dcp.load(states, checkpoint_id=tmp_path / "dcp", no_dist=True)
    resumed.load_state_dict(states["model"])
    set_optimizer_state_dict(resumed, again, states["optimizer"])
    if not chain_first:
        assert again.chain.missing == 2
        with pytest.raises(RuntimeError, match=r"lacks its first 2: .*\(save opt\.chain along with the optimizer"):
            again.chain.to_peft(tmp_path / "adapter")
        dcp.load({"chain": again.chain}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert again.chain.missing == 0
    train(opt, model, 4, start=7), train(again, resumed, 4, start=7)
    for one, two in zip(opt.chain, again.chain, strict=True):
        assert (one.index, one.step, one.seed) == (two.index, two.step, two.seed)
        for path, factor in one.factors.items():
            assert torch.equal(factor.A, two.factors[path].A)
            assert torch.equal(factor.B, two.factors[path].B)
    again.finish()
    base = Net()
    again.chain.apply(base)  # the fingerprint came along
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("steps", [3, 7])
def test_a_chains_state_survives_files_and_is_empty_without_links(steps):
    file = io.BytesIO()
    model, opt = chained(policy=StepKnots(every=3), keep_links=steps == 7)
    train(opt, model, steps)
    torch.save(opt.chain.state_dict(), file)
    file.seek(0)
    again = Chain()
    again.load_state_dict(torch.load(file, weights_only=True))
    assert (len(again), again.missing, again.keep, again.base) == (len(opt.chain), 0, opt.chain.keep, opt.chain.base)
    again.load_state_dict(Chain().state_dict())
    assert len(again) == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: {}, "'about'"),
        (
            lambda state: {**state, "about": state["about"].replace(f'"version": {FORMAT}', '"version": 1')},
            "reads format",
        ),
        (lambda state: {**state, "links": state["links"][1:]}, "a link is missing"),
        (lambda state: {**state, "links": [state["links"][0][:100], state["links"][1]]}, "links/0"),
        (lambda state: {**state, "links": 3}, "not iterable"),
        (lambda state: {"about": state["about"].replace('"missing": 0', '"missing": -1'), "links": []}, "missing=-1"),
    ],
)
def test_a_damaged_chains_state_is_refused_before_anything_changes(spoil, message):
    model, opt = chained()
    train(opt, model, 7)
    links = list(opt.chain)
    with pytest.raises(ValueError, match=message):
        opt.chain.load_state_dict(spoil(opt.chain.state_dict()))
    assert list(opt.chain) == links


def test_the_links_of_another_run_are_noticed_at_the_next_step():
    model, opt = chained()
    train(opt, model, 7)
    states = copy.deepcopy((model.state_dict(), opt.state_dict(), opt.chain.state_dict()))
    states[1].pop("cola")  # as torch.distributed.checkpoint does
    for changes in ({"seed": 1}, {"policy": StepKnots(at=[2, 6])}, {"lr": 0.01}, {"policy": StepKnots(at=[2])}):
        stranger, other = chained(**changes)
        train(other, stranger, 7)
        resumed, again = chained()
        resumed.load_state_dict(states[0])
        again.load_state_dict(states[1])
        again.chain.load_state_dict(other.chain.state_dict())
        for _ in range(2):  # asking again does not let it pass
            with pytest.raises(RuntimeError, match="load the chain that was saved with it"):
                train(again, resumed, 1, start=7)
        again.chain.load_state_dict(states[2])
        train(again, resumed, 1, start=7)


@pytest.mark.parametrize("steps", [2, 3, 4])
@pytest.mark.parametrize("r", [2, (3, 2, 1)], ids=str)
def test_state_dicts_resume_bit_for_bit_through_a_file(steps, r):
    link = LinkConfig(r=r, lora_alpha=2, target_modules=BODY, bias="lora_only")
    model, opt = chained(policy=StepKnots(every=3) | PlateauKnots(window=2), link=link)
    train(opt, model, steps)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, again = chained(policy=StepKnots(every=3) | PlateauKnots(window=2), link=link)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    assert train(again, resumed, 6, start=steps) == train(opt, model, 6, start=steps)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters()))


def test_loading_in_either_order_makes_room_for_the_links_rank():
    link = LinkConfig(r=(3, 1), lora_alpha=2, target_modules=BODY)
    model, opt = chained(link=link)
    train(opt, model, 4)
    states = copy.deepcopy((model.state_dict(), opt.state_dict()))
    resumed, again = chained(link=link)
    again.load_state_dict(states[1])
    resumed.load_state_dict(states[0])
    assert train(again, resumed, 4, start=4) == train(opt, model, 4, start=4)


def other_state(**changes):
    model, opt = chained(**changes)
    train(opt, model, 2)
    return opt.state_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: torch.optim.AdamW(Net().parameters()).state_dict(), "not saved by a ChainOptimizer"),
        (lambda: other_state(seed=5), r"seed differs \(saved 5, here 0\)"),
        (
            lambda: other_state(link=LinkConfig(r=1, lora_alpha=2, target_modules=BODY)),
            r"link differs \(r: saved \[1\], here",
        ),
        (lambda: other_state(link=LinkConfig(r=2, lora_alpha=2, target_modules=["first"])), "layers differs"),
        (lambda: other_state(policy=NeverKnots()), "the saved policy is NeverKnots"),
    ],
)
def test_state_of_another_chain_is_refused_before_anything_changes(state, message):
    model, opt = chained()
    train(opt, model, 2)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state())
    after = opt.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert all(torch.equal(v, after["state"][i][k]) for i, s in before["state"].items() for k, v in s.items())


def test_a_rank_that_is_not_in_the_plan_is_refused_by_the_model():
    model, _ = chained(link=LinkConfig(r=3, target_modules=BODY))
    other, _ = chained()
    with pytest.raises(RuntimeError, match=r"size mismatch for first\.lora_A"):
        other.load_state_dict(model.state_dict())
