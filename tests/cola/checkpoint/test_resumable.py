"""A resumed run is the run that never stopped, bit for bit."""

import copy
import math

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, EvenKnots, KnotPolicy, LinkConfig, NeverKnots, StepKnots
from tests.cola.checkpoint.resumed import CASES, KNOT, TOTAL, made, same, undisturbed, wrap
from tests.models import BODY, Net, closure_steps, loss_of, tiny_gpt2, train

pytestmark = pytest.mark.numerics

# the precisions at, before and after a knot; the rest after one, where everything is at stake
PRECISIONS = ("fp32", "bf16 stochastic", "bf16 compensated", "rank step-down")
STOPS = [(case, stop) for case in PRECISIONS for stop in (KNOT - 1, KNOT, KNOT + 1, 2 * KNOT)]
STOPS += [(case, KNOT + 1) for case in CASES if case not in PRECISIONS]


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


@pytest.mark.parametrize("through", ["directory", "state_dict"])
def test_a_plan_that_gives_way_to_the_saved_one_is_named(tmp_path, caplog, through):
    """The policy of the run goes on, whatever plan the new optimizer was made with."""

    def chained(total_steps):
        policy, link = EvenKnots(length=2, total_steps=total_steps), LinkConfig(r=2, target_modules=BODY)
        model = Net()
        return model, ChainOptimizer(torch.optim.SGD, model, policy=policy, link=link, lr=0.01)

    model, opt = chained(8)
    train(opt, model, 5)
    opt.save(tmp_path)
    caplog.clear()
    for total_steps in (8, 20):
        again, resumed = chained(total_steps)
        if through == "directory":
            resumed.load(tmp_path)
        else:
            again.load_state_dict(model.state_dict())
            resumed.load_state_dict(opt.state_dict())
        assert repr(resumed.policy) == "EvenKnots(length=2, total_steps=8)"
        told = "its own policy, EvenKnots(length=2, total_steps=8), in place of EvenKnots(length=2, total_steps=20)"
        assert (told in caplog.text) == (total_steps == 20)
        assert len(caplog.records) == (total_steps == 20)


class At(KnotPolicy):
    """A user's own, whose tuple comes back from JSON as a list."""

    def __init__(self, at=(3,)):
        self.at = at

    def update(self, signal):
        return signal.step in self.at


@pytest.mark.parametrize(
    ("saved", "given", "told"),
    [
        (StepKnots(at=[5, 6, 7, 8, 9, 10, 11]), StepKnots(at=[5, 6, 7, 8, 9, 10, 12]), True),  # beyond what is shown
        (StepKnots(at=[5]) | NeverKnots(), StepKnots(at=[6]) | NeverKnots(), True),
        (StepKnots(at=[5]) | NeverKnots(), StepKnots(at=[5]) | NeverKnots(), False),
        (At((3, 4)), At((3, 4)), False),
        (At((3, 4)), At((3, 5)), True),
    ],
    ids=repr,
)
def test_plans_are_compared_in_full_and_by_value(saved, given, told, tmp_path, caplog):
    link = LinkConfig(r=2, target_modules=BODY)
    ChainOptimizer(torch.optim.SGD, Net(), policy=saved, link=link, lr=0.01).save(tmp_path)
    ChainOptimizer(torch.optim.SGD, Net(), policy=given, link=link, lr=0.01).load(tmp_path)
    assert ("goes on with its own policy" in caplog.text) is told
