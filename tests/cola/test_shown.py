"""What a run shows of itself: one line at every stage, its reports, and the number of its trained parameters."""

import copy

import pytest
import torch
from torch import nn

from cola import (
    Chain,
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
from tests.models import BODY, Net, train

LINK = LinkConfig(r=2, target_modules=BODY)


def chained(model=None, policy=None, link=LINK, **options):
    model = Net() if model is None else model
    policy = StepKnots(every=3) if policy is None else policy
    return model, ChainOptimizer(torch.optim.AdamW, model, policy=policy, link=link, lr=0.02, **options)


def require_a_line(*things):
    for thing in things:
        text = repr(thing)
        assert "\n" not in text
        assert len(text) < 200, text
        assert not {"tensor", "Parameter", "device", " at 0x"} & set(text.replace("(", " ").split()), text
        assert " at 0x" not in text


def everything(opt):
    factors = [factor for link in opt.chain for factor in link.factors.values()]
    return [
        opt,
        opt.chain,
        opt.policy,
        opt.live,
        opt.coverage(),
        opt.chain.summary(),
        *([] if opt.chain.base is None else [opt.chain.base]),
        *opt.reports,
        *opt.chain,
        *factors,
    ]


@pytest.mark.parametrize(
    "options", [{}, {"keep_links": False}, {"link": LinkConfig(r=1, target_modules=BODY, init="two-sided")}]
)
def test_everything_is_one_short_line_at_every_stage(options, tmp_path):
    model, opt = chained(**options)
    seen = []
    opt.on_knot(lambda report: seen.extend([repr(opt), *map(repr, everything(opt))]))
    require_a_line(*everything(opt))
    train(opt, model, 2)
    require_a_line(*everything(opt))
    assert repr(opt.chain).endswith("and a live one)")
    train(opt, model, 2, start=2)
    require_a_line(*everything(opt))
    state, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    if not options:
        opt.save(tmp_path / "run")
    opt.finish()
    assert len(seen) > 10
    assert not [text for text in seen if "\n" in text or "tensor" in text]
    require_a_line(*everything(opt))
    assert repr(opt).startswith("ChainOptimizer(finished with 2 links, StepKnots(every=3), AdamW, 4 steps")
    again, other = chained(**options)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    require_a_line(*everything(other))
    if not options:
        _, resumed = chained()
        resumed.load(tmp_path / "run")
        require_a_line(*everything(resumed))
        assert repr(resumed) == repr(other) == "ChainOptimizer(link 1, r=2, StepKnots(every=3), AdamW, 4 steps)"


class Untold(KnotPolicy):
    """Without a constructor."""

    def __init__(self):
        self.seen, self.notes, self.last = 0, list(range(1000)), None

    def update(self, signal):
        return False


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (NeverKnots(), "NeverKnots()"),
        (StepKnots(every=5), "StepKnots(every=5)"),
        (StepKnots(at=[*range(1, 500)]), "StepKnots(at=[1, 2, 3, 4, 5, 6, ...])"),
        (EpochKnots(at=[3], steps_per_epoch=10), "EpochKnots(at=[3], steps_per_epoch=10)"),
        (EvenKnots(3, 30), "EvenKnots(length=3, total_steps=30)"),
        (PlateauKnots(), "PlateauKnots(window=20, share=0.5)"),
        (PlateauKnots(mode="max", patience=2), "PlateauKnots(mode='max', patience=2, threshold=0.001, window=20)"),
        (GapKnots(total_steps=1000), "GapKnots(window=10, total_steps=1000)"),
        (StepKnots(every=5) | NeverKnots(), "(StepKnots(every=5) | NeverKnots())"),
        (Untold(), "Untold(seen=0, notes=[0, 1, 2, 3, 4, 5, ...], last=None)"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_policy_reads_as_it_was_made(policy, text):
    assert repr(policy) == text


def test_a_policy_that_has_seen_losses_still_reads_as_it_was_made():
    model, opt = chained(policy=PlateauKnots(window=50) | GapKnots(window=50))
    train(opt, model, 4)
    assert repr(opt.policy) == "(PlateauKnots(window=50, share=0.5) | GapKnots(window=50))"


# the reports so far


def test_reports_are_those_that_the_listeners_got():
    model, opt = chained()
    told = []
    opt.on_knot(told.append)
    assert opt.reports == ()
    train(opt, model, 7)
    assert opt.reports == tuple(told)
    opt.finish()
    assert opt.reports == tuple(told)
    assert [report.step for report in opt.reports] == [3, 6, 7]


def test_reports_come_back_with_a_checkpoint_and_go_with_a_link_that_is_undone(tmp_path):
    base = Net()
    model, opt = chained(copy.deepcopy(base))
    train(opt, model, 7)
    opt.save(tmp_path)
    _, resumed = chained(copy.deepcopy(base))
    resumed.load(tmp_path)
    assert resumed.reports == opt.reports
    again, other = chained(copy.deepcopy(base))
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.reports == opt.reports
    before = opt.reports
    opt.undo(base)
    assert opt.reports == before[:1]
    _, following = chained(copy.deepcopy(base))
    following.follow(Chain(list(opt.chain), base=opt.chain.base))
    assert following.reports == before[:1]


def test_reports_need_no_links(tmp_path):
    model, opt = chained(keep_links=False)
    train(opt, model, 7)
    assert [report.step for report in opt.reports] == [3, 6]
    again, other = chained(keep_links=False)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.reports == opt.reports


# the number of trained parameters


def shown(opt, capsys):
    capsys.readouterr()
    opt.print_trainable_parameters()
    return capsys.readouterr().out


def test_trained_parameters_are_counted_with_heads_and_biases(capsys):
    model = Net()
    plain = sum(p.numel() for p in model.parameters())
    link = LinkConfig(r=2, target_modules=BODY, bias="lora_only", modules_to_save=["head"])
    _, opt = chained(model, link=link)
    factors = 2 * 2 * (6 + 6)
    mine, total = factors + 6 + (6 * 3 + 3), plain + factors
    line = f"trainable params: {mine:,d} || all params: {total:,d} || trainable%: {100 * mine / total:.4f}\n"
    assert shown(opt, capsys) == line
    train(opt, model, 4)
    assert shown(opt, capsys) == line
    opt.finish()
    assert shown(opt, capsys) == line


@pytest.mark.parametrize(("train_", "mine"), [("both", 48), ("A", 24), ("B", 24)])
def test_a_frozen_factor_is_not_counted_as_trained(train_, mine, capsys):
    _, opt = chained(link=LinkConfig(r=2, target_modules=BODY, train=train_))
    assert shown(opt, capsys).startswith(f"trainable params: {mine} || ")


def test_a_shared_weight_counts_once_and_what_the_caller_adds_counts(capsys):
    model = Net()
    model.again = model.second
    _, opt = chained(model, link=LinkConfig(r=1, target_modules=["first"]))
    plain = sum(p.numel() for p in model.parameters())
    assert shown(opt, capsys) == f"trainable params: 12 || all params: {plain} || trainable%: {1200 / plain:.4f}\n"
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(1000)), model.head.bias]})
    assert shown(opt, capsys).startswith(f"trainable params: 1,015 || all params: {plain + 1000:,d} || ")


def test_a_rank_that_shrinks_is_counted(capsys):
    model, opt = chained(link=LinkConfig(r=(2, 1), target_modules=BODY))
    assert shown(opt, capsys).startswith("trainable params: 48 || ")
    train(opt, model, 3)
    assert shown(opt, capsys).startswith("trainable params: 24 || ")


def test_rounding_that_loses_nothing_on_average_is_not_called_a_loss():
    for rounding, words in [("nearest", " of it lost to rounding,"), ("stochastic", ", rounding noise ")]:
        _, opt = chained(Net(dtype=torch.bfloat16), rounding=rounding)
        train(opt, opt.model, 3, dtype=torch.bfloat16)
        assert words in str(opt.reports[0])
