"""The live link that a checkpoint holds, tied without its optimizer, is what `finish` ties: a table."""

import pytest
import torch
from torch import nn

from cola import Chain, ChainOptimizer, LinkConfig, StepKnots
from cola.checkpoint.untied_link import read_untied_link
from tests.models import BODY, Net, loss_of, train


class Normed(Net):
    """With running statistics."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.second(torch.tanh(self.first(x))))))


class Shared(Net):
    """The head is in two places."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.again = nn.Linear(6, 3, bias=False)
        self.again.weight = self.head.weight


def made(net=Net, dtype=torch.float32, base=torch.optim.AdamW, **options):
    kwargs = {name: options.pop(name) for name in ("rounding", "reset") if name in options}
    lr = options.pop("lr", 0.02)
    link = LinkConfig(**{"r": 2, "lora_alpha": 2, "target_modules": BODY, **options})
    return ChainOptimizer(base, net(dtype=dtype), StepKnots(every=3), link=link, lr=lr, **kwargs)


HALF = {"dtype": torch.bfloat16}
#: options of the run, its steps, and those since the knot
CASES = {
    "plain": ({}, 5, 2),
    "the first link": ({}, 2, 2),
    "biases": ({"bias": "lora_only"}, 5, 2),
    "a head that is shared": ({"net": Shared, "modules_to_save": ["head"]}, 5, 2),
    "a head alone has moved": ({"modules_to_save": ["head"], "train": "B", "init": "selector", "lr": 1e-12}, 2, 2),
    "falling ranks": ({"r": (3, 2, 1), "scaling": "alpha/r"}, 5, 2),
    "stochastic": (HALF, 5, 2),
    "compensated": ({**HALF, "rounding": "compensated"}, 5, 2),
    "selected inputs": ({"train": "B", "init": "selector"}, 5, 2),
    "two-sided": ({"init": "two-sided"}, 5, 2),
    "running statistics": ({"net": Normed}, 5, 2),
    "statistics alone": ({"net": Normed, "lr": 0.0}, 5, 2),
    "right after a knot": ({}, 6, None),
    "no step": ({}, 0, None),
    "nothing has moved": ({"lr": 0.0}, 5, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_live_link_of_a_checkpoint_is_the_one_that_finish_ties(case, tmp_path):
    options, steps, since = CASES[case]
    dtype, net = options.get("dtype", torch.float32), options.get("net", Net)
    opt = made(**options)
    train(opt, opt.model, steps, dtype=dtype)
    opt.save(tmp_path)
    opt.finish()
    chain = Chain.load(tmp_path)
    untied = read_untied_link(tmp_path, chain)
    assert (untied is None) == (since is None)
    if untied is not None:
        assert (untied.steps, untied.obstacle) == (since, None)
        chain._append(untied.link)
    assert len(chain) == len(opt.chain)
    for ours, theirs in zip(chain, opt.chain):
        assert (ours.index, ours.step, ours.rank, ours.seed) == (theirs.index, theirs.step, theirs.rank, theirs.seed)
        assert ours.trained.keys() == theirs.trained.keys()
        assert ours.report.delta_norm == pytest.approx(theirs.report.delta_norm, rel=1e-6)
    model = net(dtype=dtype)
    chain.apply(model)
    mine, theirs = model.state_dict(), opt.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_chain_that_has_gone_on_in_the_same_directory_has_no_live_link_there(tmp_path):
    opt = made()
    train(opt, opt.model, 5)
    opt.save(tmp_path)
    opt.finish()
    opt.chain.save(tmp_path)
    assert read_untied_link(tmp_path, Chain.load(tmp_path)) is None


def test_a_chain_alone_has_none(tmp_path):
    Chain().save(tmp_path)
    assert read_untied_link(tmp_path, Chain.load(tmp_path)) is None


def test_a_base_with_modes_ties_its_own_link(tmp_path):
    base = pytest.importorskip("schedulefree").AdamWScheduleFree
    opt = made(base=base)
    opt.train()
    for step in range(2):
        opt.zero_grad()
        loss_of(opt.model, step).backward()
        opt.step()
    opt.save(tmp_path)
    untied = read_untied_link(tmp_path, Chain.load(tmp_path))
    assert "use opt.load and opt.finish" in untied.obstacle
    opt.eval()  # what is saved now is what would be tied
    opt.save(tmp_path)
    assert read_untied_link(tmp_path, Chain.load(tmp_path)).obstacle is None
