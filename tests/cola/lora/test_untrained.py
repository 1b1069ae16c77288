"""Links that train nothing are named once, at the first knot or at the end; steps that did not count are told of."""

import copy
import logging
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cola import ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from tests.models import BODY, Net, batch, loss_of, train

HEAD = {"modules_to_save": ["head"]}


def wrap(model, policy=None, base=torch.optim.AdamW, lr=0.02, **link):
    link = LinkConfig(**{"r": 2, "lora_alpha": 2, "target_modules": BODY, **link})
    return ChainOptimizer(base, model, policy or StepKnots(every=2), link=link, lr=lr)


def words(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class ReadsWeight(Net):
    """Reads the second layer's weight without calling the layer."""

    def forward(self, x):
        return self.head(torch.tanh(F.linear(torch.tanh(self.first(x)), self.second.weight)))


class Reentrant(Net):
    def forward(self, x):
        return self.head(
            checkpoint(lambda x: torch.tanh(self.second(torch.tanh(self.first(x)))), x, use_reentrant=True)
        )


class NoGrad(Net):
    def forward(self, x):
        with torch.no_grad():
            hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(hidden)


class Experts(Net):
    """The first expert is always chosen; the second gets no token, or no rows."""

    empty = False

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))

    def forward(self, x):
        out = x + self.experts[0](x)
        if self.empty:  # called with nothing: the gradient is there, and zero
            for expert in self.experts[1:]:
                out = out.index_add(0, torch.zeros(0, dtype=torch.long), expert(x[:0]))
        return super().forward(out)


def freeze(model):
    for name, parameter in model.named_parameters():
        if "head" not in name:
            parameter.requires_grad_(False)


def freeze_B(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.requires_grad_(False)


ALL = r"link 0 has trained nothing: after 2 steps lora_B of all 2 layers \(first, second\) has had no gradient"
SECOND = r"link 0: after 2 steps lora_B of 1 of 2 layers \(second\) has had no gradient"
RUNS = {
    "frozen afterwards": (Net, freeze, HEAD, ALL),
    "only B frozen": (Net, freeze_B, {}, ALL),
    "no_grad": (NoGrad, lambda model: None, HEAD, ALL),
    "reentrant": (Reentrant, lambda model: None, HEAD, ALL),
    "read by weight": (ReadsWeight, lambda model: None, {}, SECOND),
    "one layer frozen": (Net, lambda model: freeze_B(model.second), {}, SECOND),
}


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("policy", [lambda: StepKnots(every=2), NeverKnots])
def test_layers_that_have_had_no_gradient_are_named_once(caplog, run, base, policy):
    kind, then, link, expected = RUNS[run]
    model = kind()
    opt = wrap(model, policy(), base, **link)
    then(model)
    train(opt, model, 7)
    if policy is NeverKnots:
        assert not words(caplog)
        expected = expected.replace("after 2 steps", "after 7 steps")
    opt.finish()
    (said,) = words(caplog)
    assert re.search(expected, said), said
    assert "use_reentrant=False" in said


def test_only_A_is_trained_and_gets_no_gradient(caplog):
    model = Net()
    opt = wrap(model, train="A", **HEAD)
    freeze(model)
    train(opt, model, 3)
    assert "lora_A of all 2 layers" in words(caplog)[0]


@pytest.mark.parametrize("empty", [False, True])
def test_experts_that_get_no_token_are_named_mildly_and_few(caplog, empty):
    model = Experts()
    model.empty = empty
    opt = wrap(model, target_modules=r"experts\.\d|first")
    train(opt, model, 3)
    (said,) = words(caplog)
    assert "lora_B of 4 of 6 layers (experts.1, experts.2, experts.3 and 1 more)" in said
    assert "expected for experts that received no token" in said


QUIET = {
    "all trained": ({}, {}),
    "rate zero": ({"lr": 0.0}, HEAD),
    "only A": ({}, {"train": "A"}),
    "only B": ({}, {"train": "B"}),
    "masked": ({}, {"rank_change": "mask", "r": (2, 1)}),
}


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("case", QUIET)
def test_trained_links_and_links_at_rest_are_not_mentioned(caplog, case, base):
    kwargs, link = QUIET[case]
    model = Net()
    opt = wrap(model, base=base, **kwargs, **link)
    train(opt, model, 5)
    opt.finish()
    assert not words(caplog)


def test_nothing_is_said_of_chains_that_never_stepped(caplog):
    opt = wrap(Net(), NeverKnots())
    opt.tie()
    opt.finish()
    assert not words(caplog)


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_run_that_ends_without_gradients_says_so(caplog, after):
    model = Net()
    opt = wrap(model, NeverKnots() if after == 1 else StepKnots(every=2))
    train(opt, model, after)
    opt.zero_grad()
    freeze(model)
    for number in range(5):
        loss_of(model, number).requires_grad_(True)
        opt.step()
        opt.zero_grad()
    assert not words(caplog)
    opt.finish()
    said = words(caplog)[0]
    assert "the last 5 calls of step() found no gradient and were not counted" in said
    assert f"({after} earlier ones were, {after % 2} of them in" in said
    assert "frozen after" in said
    assert len(words(caplog)) == 1


def test_probes_and_a_last_empty_step_are_not_mentioned(caplog):
    model = Net()
    opt = wrap(model)
    train(opt, model, 4)
    opt.zero_grad()
    opt.step()  # what is left of an accumulation
    for group in opt.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    for _ in range(3):
        opt.step()
    opt.finish()
    assert not words(caplog)


def test_a_copy_and_a_resumed_run_count_on(caplog):
    model, opt = (pair := copy.deepcopy((m := Net(), wrap(m))))
    train(opt, model, 3)
    opt.load_state_dict(opt.state_dict())
    copy.deepcopy(pair)[1].finish()
    assert not words(caplog)
    x, _ = batch(0)
    assert model(x).shape == (8, 3)
