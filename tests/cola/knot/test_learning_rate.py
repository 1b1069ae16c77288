"""The learning rate after a knot: continue, rewarm, restart, with every scheduler of torch."""

import io

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from cola import ChainOptimizer, LinkConfig, StepKnots, restart, rewarm
from tests.models import BODY, Net, loss_of

LINK = LinkConfig(r=2, lora_alpha=2, target_modules=BODY, modules_to_save=["head"])

SCHEDULERS = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: schedules.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, total_iters=3),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 10),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=3),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, max_lr=0.1, total_steps=30),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=2), schedules.CosineAnnealingLR(o, 10)], [2]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.1, 2), schedules.ExponentialLR(o, 0.9)]
    ),
}


def chained(every=3):
    model = Net()
    return model, ChainOptimizer(torch.optim.SGD, model, StepKnots(every=every), link=LINK, lr=0.02, momentum=0.9)


def rates(opt, scheduler, steps, start=0):
    """The rate that the base's step saw, per group."""
    seen = []
    base_step = opt.base.step

    def watched(*args):
        seen.append([group["lr"] for group in opt.base.param_groups])
        return base_step(*args)

    opt.base.step = watched
    for step in range(start, start + steps):
        opt.zero_grad()
        loss_of(opt.model, step).backward()
        opt.step()
        scheduler.step()
    opt.base.step = base_step
    return seen


def plain_rates(name, steps):
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02, momentum=0.9)
    scheduler, seen = SCHEDULERS[name](plain), []
    for _ in range(steps):
        seen.append(plain.param_groups[0]["lr"])
        plain.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
def test_continue_is_the_default(name):
    _, opt = chained()
    assert [r[0] for r in rates(opt, SCHEDULERS[name](opt), 8)] == plain_rates(name, 8)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_restart_runs_the_whole_schedule_in_every_link(name):
    _, opt = chained()
    scheduler = SCHEDULERS[name](opt)
    restart(opt, scheduler)
    link = plain_rates(name, 3)
    assert [r[0] for r in rates(opt, scheduler, 9)] == link * 3


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rewarm_scales_the_adapters_rate_and_the_scheduler_never_sees_it(name):
    _, opt = chained(every=4)
    rewarm(opt, 2)
    seen, wanted = rates(opt, SCHEDULERS[name](opt), 10), plain_rates(name, 10)
    factors = [1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1 / 3, 2 / 3]
    assert [r[0] for r in seen] == pytest.approx([f * w for f, w in zip(factors, wanted)])
    assert [r[1] for r in seen] == wanted


def test_both_together():
    _, opt = chained()
    scheduler = SCHEDULERS["ExponentialLR"](opt)
    rewarm(opt, 1), restart(opt, scheduler)
    first = [0.02, 0.016, 0.0128]
    later = [0.01, 0.016, 0.0128]
    assert [r[0] for r in rates(opt, scheduler, 9)] == pytest.approx(first + later + later)


@pytest.mark.parametrize("steps", [3, 4, 5, 7])
def test_both_go_on_from_a_state_dict(steps):
    def make():
        model, opt = chained()
        scheduler = SCHEDULERS["OneCycleLR"](opt)
        rewarm(opt, 2), restart(opt, scheduler)
        return model, opt, scheduler

    model, opt, scheduler = make()
    rates(opt, scheduler, steps)
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict(), scheduler.state_dict()], file)
    wanted = rates(opt, scheduler, 6, steps)
    file.seek(0)
    resumed = make()
    for part, state in zip(resumed, torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    assert rates(*resumed[1:], 6, steps) == wanted


def test_a_step_that_raises_leaves_the_full_rate_behind():
    model, opt = chained(every=2)
    rewarm(opt, 3)
    scheduler = SCHEDULERS["StepLR"](opt)
    rates(opt, scheduler, 3)
    loss_of(model, 0).backward()
    with torch.no_grad():
        model.first.lora_B.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        opt.step()
    opt.zero_grad()
    opt.step()
    assert opt.param_groups[0]["lr"] == opt.param_groups[1]["lr"]


def test_a_knot_by_hand_rewarms():
    _, opt = chained(every=50)
    rewarm(opt, 1)
    scheduler = SCHEDULERS["ConstantLR"](opt)
    rates(opt, scheduler, 4)
    opt.tie()
    assert [r[0] for r in rates(opt, scheduler, 2)] == [0.01, 0.02]


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, None])
def test_rewarm_wants_a_positive_number(steps):
    with pytest.raises(ValueError, match=r"rewarm\(steps=.*\) must be a positive integer"):
        rewarm(chained()[1], steps)


def test_restart_wants_its_own_scheduler():
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"is of another optimizer"):
        restart(chained()[1], schedules.StepLR(other, 1))
