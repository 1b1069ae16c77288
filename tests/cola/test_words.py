"""Errors and warnings that name the argument, say what is wrong with it, and what to do."""

import copy
import logging
import re

import pytest
import torch
from torch import nn

from cola import (
    ChainOptimizer,
    EpochKnots,
    EvenKnots,
    GapKnots,
    KnotPolicy,
    LinkConfig,
    NeverKnots,
    PlateauKnots,
    StepKnots,
)
from tests.cola.chain.chained import chained
from tests.models import BODY, Net, loss_of, train

LINK = LinkConfig(r=2, lora_alpha=2, target_modules=BODY)

# base callables that look at less than what they are given

BASES = {
    "the class": torch.optim.AdamW,
    "the first group": lambda groups: torch.optim.AdamW(groups[:1]),
    "the first group's parameters": lambda groups: torch.optim.AdamW(groups[0]["params"]),
    "all in one group": lambda groups: torch.optim.AdamW([p for group in groups for p in group["params"]]),
}


def with_extra(base):
    model, extra = Net(), nn.Parameter(torch.ones(2))
    opt = ChainOptimizer(base, model, StepKnots(every=3), link=LINK)
    opt.add_param_group({"params": [extra], "lr": 0.1})
    return model, opt, extra


def steps(model, opt, extra, numbers):
    for number in numbers:
        opt.zero_grad()
        (loss_of(model, number) + extra.square().sum()).backward()
        opt.step()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("way", ["directory", "states"])
def test_a_base_callable_that_makes_one_group_goes_on_with_added_ones(base, way, tmp_path):
    model, opt, extra = with_extra(BASES[base])
    steps(model, opt, extra, range(4))
    resumed, again, other = with_extra(BASES[base])
    if way == "directory":
        opt.save(tmp_path)
        again.load(tmp_path)
    else:
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
        resumed.load_state_dict(model.state_dict())
        with torch.no_grad():
            other.copy_(extra)
    steps(model, opt, extra, range(4, 8)), steps(resumed, again, other, range(4, 8))
    assert torch.equal(extra, other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters()))
    assert again.state[other]["step"].item() == 8


def test_a_base_callable_that_drops_parameters_is_refused_at_once():
    link = LinkConfig(r=2, target_modules=BODY, modules_to_save=["head"])
    with pytest.raises(ValueError, match=r"did not take the parameters.*all 2 groups, 6 in number, and took 4"):
        ChainOptimizer(BASES["the first group"], Net(), NeverKnots(), link=link)


# states and directories

_, TRAINED = chained()
train(TRAINED, TRAINED.model, 4)


def state_of(**kwargs):
    model, opt = chained(**kwargs)
    train(opt, model, 4)
    return copy.deepcopy(opt.state_dict())


def more_groups():
    model, opt = chained()
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    train(opt, model, 2)
    return opt.state_dict()


REFUSED = {
    "no dict": (lambda opt, path: opt.load_state_dict([]), TypeError, r"state_dict=\[\] must be a dict"),
    "another base": (
        lambda opt, path: opt.load_state_dict(state_of(base=torch.optim.Adagrad)),
        ValueError,
        r"the saved run's base optimizer is torch\.Adagrad, here it is torch\.AdamW",
    ),
    "more groups": (
        lambda opt, path: opt.load_state_dict(more_groups()),
        ValueError,
        r"groups hold \[4, 1\] parameters, here they hold \[4\].*add_param_group",
    ),
    "a chain's directory": (
        lambda opt, path: (TRAINED.chain.save(path), opt.load(path)),
        ValueError,
        r"holds a chain from Chain\.save.*opt\.follow\(Chain\.load",
    ),
    "follow": (lambda opt, path: opt.follow([]), TypeError, r"follow\(chain=\[\]\) needs a Chain"),
    "undo": (lambda opt, path: (opt.tie(), opt.undo(None)), TypeError, r"undo\(base=None\) needs the untouched model"),
    "a group without parameters": (lambda opt, path: opt.add_param_group({}), TypeError, "a dict with 'params'"),
    "no group": (lambda opt, path: opt.add_param_group([]), TypeError, "a dict with 'params'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_our_words(case, tmp_path):
    call, error, message = REFUSED[case]
    model, opt = chained()
    with pytest.raises(error, match=message):
        call(opt, tmp_path)
    train(opt, model, 2)


# half precision


def half():
    return Net(dtype=torch.float16)


HALF = {
    "head": ({"modules_to_save": ["head"]}, r"head\.weight, head\.bias will be trained in float16"),
    "biases": ({"bias": "lora_only"}, r"first\.bias will be trained in float16"),
    "factors": ({"dtype": torch.float16}, r"first\.lora_A, first\.lora_B, second\.lora_A and 1 more will be trained"),
}


@pytest.mark.parametrize("case", HALF)
def test_what_is_trained_in_fp16_is_named_at_once(case, caplog):
    link, message = HALF[case]
    ChainOptimizer(torch.optim.AdamW, half(), NeverKnots(), link=LinkConfig(r=2, target_modules=BODY, **link))
    (said,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert re.search(message, said), said
    assert "head.float()" in said


def test_added_parameters_in_fp16_are_named(caplog):
    model = half()
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LINK)
    assert not caplog.records
    opt.add_param_group({"params": [model.head.weight]})
    opt.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=torch.float16))]})
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("head.weight will be trained in float16")
    assert second.startswith("the added parameter 0 (3,) will be trained in float16")


def test_a_head_made_float_trains_under_the_scaler(caplog):
    model = half()
    model.head.float()
    link = LinkConfig(r=2, target_modules=BODY, modules_to_save=["head"])
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=link, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = model.head.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = loss_of(model, 0, dtype=torch.float16)
    scaler.scale(loss).backward()
    scaler.unscale_(opt)
    scaler.step(opt)
    assert opt.steps == 1
    assert not torch.equal(before, model.head.weight)
    assert not caplog.records


# a run in which no knot was tied


class Asks(KnotPolicy):
    """A user's own rule."""

    def update(self, signal):
        return False


ONE = r"^no knot was tied in 4 steps: this run was one LoRA\. {} EvenKnots\(length=M, total_steps=n\)"
#: the policy, and the one warning at the end of four steps, if any
ENDS = {
    "late steps": (lambda: StepKnots(at=[50]), ONE.format(r"StepKnots had still planned knots after steps \[50\]\..*")),
    "too rarely": (lambda: StepKnots(every=9), ONE.format(r"StepKnots asked for none, .* due after 9 steps\..*")),
    "an early end": (lambda: EvenKnots(2, 20), ONE.format(r"EvenKnots had still planned knots after steps \[10\]\..*")),
    "late epochs": (
        lambda: EpochKnots([3], 2),
        ONE.format(r"EpochKnots had still planned knots after epochs \[3\]\..*"),
    ),
    "long windows": (lambda: PlateauKnots(), ONE.format(r"PlateauKnots asked for none.* window=20 a link has 100 .*")),
    "no room": (
        lambda: GapKnots(window=1, cooldown=1, total_steps=4),
        ONE.format(r"GapKnots asked for none.* window=1 it needs total_steps=5 or more.*"),
    ),
    "no reason known": (lambda: GapKnots(window=1, cooldown=0), ONE.format(r"GapKnots asked for none\..*")),
    "one's own": (Asks, ONE.format(r"Asks asked for none\..*")),
    "both of two": (lambda: PlateauKnots() & StepKnots(every=2), ONE.format(r"\(PlateauKnots & StepKnots\) asked.*")),
    "either of two": (lambda: NeverKnots() | StepKnots(every=9), ONE.format(r"\(NeverKnots \| StepKnots\) asked .*")),
    "never": (NeverKnots, None),
    "never, and": (lambda: NeverKnots() & StepKnots(every=2), None),
    "never, or": (lambda: NeverKnots() | EvenKnots(1, 4), None),
    "one link": (lambda: EvenKnots(1, 4), None),
    "at most one link": (lambda: PlateauKnots(max_links=1), None),
    "a knot": (lambda: StepKnots(every=3), None),
    "a knot, and plans": (
        lambda: StepKnots(at=[2, 50]),
        r"^the run ended after 4 steps, and StepKnots had still planned knots after steps \[50\]$",
    ),
}


def told(caplog):
    words = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [message for message in words if "no knot" in message or "still planned" in message]


@pytest.mark.parametrize("case", ENDS)
def test_a_run_without_a_knot_says_once_that_it_was_one_lora(case, caplog):
    policy, message = ENDS[case]
    model, opt = chained(policy=policy())
    train(opt, model, 4)
    opt.finish()
    assert len(told(caplog)) == bool(message), told(caplog)
    assert not message or re.search(message, told(caplog)[0]), told(caplog)[0]


QUIET = {
    "tied by hand": lambda opt: (train(opt, opt.model, 2), opt.tie(), train(opt, opt.model, 2, start=2), opt.finish()),
    "no steps": lambda opt: opt.finish(),
    "dropped": lambda opt: (train(opt, opt.model, 2), opt.finish(merge=False)),
    "after an earlier chain": lambda opt: (opt.follow(followed()), train(opt, opt.model, 2), opt.finish()),
}


def followed():
    model, opt = chained(policy=NeverKnots())
    train(opt, model, 2)
    opt.finish()
    return opt.chain


@pytest.mark.parametrize("case", QUIET)
def test_nothing_is_said_where_the_user_decided(case, caplog):
    _, opt = chained(policy=Asks())
    QUIET[case](opt)
    assert not told(caplog)
