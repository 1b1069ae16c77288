"""Changes the learning rate after a knot: links warm up (`rewarm`) or repeat the whole schedule (`restart`).

Both hook into `ChainOptimizer.step` and work with any scheduler: `rewarm` scales the rate during a step, so the
scheduler never sees it; `restart` resets the scheduler to its first state. Their counters are in ``param_groups``,
which every kind of checkpoint saves. Hooks are not saved: call the functions again on a resumed or copied optimizer,
before its state is loaded.
"""

import copy
from typing import Any

from cola.knot.reset import groups_with
from cola.optimizer import ChainOptimizer

_REWARM, _RESTART = "cola_rewarm", "cola_restart"


def rewarm(opt: ChainOptimizer, steps: int) -> None:
    """Warm up every link but the first: its k-th step has ``min(1, k / (steps + 1))`` of the learning rate.

    Args:
        opt: the chain's optimizer; only the rate of its adapters is scaled.
        steps: number of steps below the full rate; at least 1.

    Raises:
        ValueError: steps is not a positive integer.

    >>> import torch
    >>> from cola import LinkConfig, StepKnots
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> link = LinkConfig(r=1, target_modules="all-linear")
    >>> opt = ChainOptimizer(torch.optim.SGD, model, policy=StepKnots(every=2), link=link, lr=0.1)
    >>> rewarm(opt, steps=1)
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"rewarm(steps={steps!r}) must be a positive integer")
    opt.param_groups[0].setdefault(_REWARM, steps)  # steps since the knot; the first link needs no warm-up
    full: list[tuple[dict[str, Any], Any]] = []
    taken, tied = opt.steps, False

    def before(_opt: Any, _args: Any, _kwargs: Any) -> None:
        nonlocal taken, tied
        put_back()  # after a step that raised
        first = opt.param_groups[0]
        if tied:  # by opt.tie()
            first[_REWARM], tied = 0, False
        done, taken = first.get(_REWARM, steps), opt.steps
        if done < steps:
            for group in groups_with(opt.param_groups, opt.live.adapters()):
                full.append((group, group["lr"]))
                group["lr"] = group["lr"] * ((done + 1) / (steps + 1))

    def put_back() -> None:
        while full:
            group, rate = full.pop()
            group["lr"] = rate

    def after(*_: Any) -> None:
        nonlocal tied
        put_back()
        first = opt.param_groups[0]
        first[_REWARM] = 0 if tied else min(first.get(_REWARM, steps) + opt.steps - taken, steps)
        tied = False

    def knotted(_report: Any) -> None:
        nonlocal tied
        tied = True

    opt.register_step_pre_hook(before)
    opt.register_step_post_hook(after)
    opt.on_knot(knotted)


def restart(opt: ChainOptimizer, scheduler: Any) -> None:
    """Restart the schedule at every link, whose first step has the schedule's first rate.

    Args:
        opt: the chain's optimizer.
        scheduler: one of `torch.optim`, or another with ``state_dict`` and ``load_state_dict``; just made, over
            ``opt``. Its other entries in ``param_groups``, e.g. the momentum of OneCycleLR, are reset with it.

    Raises:
        ValueError: the scheduler was made over another optimizer.

    >>> import torch
    >>> from cola import LinkConfig, StepKnots
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> link = LinkConfig(r=1, target_modules="all-linear")
    >>> opt = ChainOptimizer(torch.optim.SGD, model, policy=StepKnots(every=2), link=link, lr=0.1)
    >>> restart(opt, torch.optim.lr_scheduler.ExponentialLR(opt, 0.5))
    """
    if getattr(scheduler, "optimizer", opt) is not opt:
        raise ValueError("scheduler is of another optimizer: make it over the ChainOptimizer")
    opt.param_groups[0].setdefault(_RESTART, opt.live.index)
    first = copy.deepcopy(scheduler.state_dict())
    groups = [{name: value for name, value in group.items() if name != "params"} for group in opt.param_groups]
    schedules = {"lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "momentum", "betas"}

    def before(_opt: Any, _args: Any, _kwargs: Any) -> None:
        # here and not at the knot: the scheduler.step() in between would skip the first rate
        group = opt.param_groups[0]
        if group.get(_RESTART, 0) == opt.live.index:
            return
        group[_RESTART] = opt.live.index
        scheduler.load_state_dict(copy.deepcopy(first))
        for now, then in zip(opt.param_groups, groups):
            now.update({name: then[name] for name in schedules & then.keys()})

    handle = opt.register_step_pre_hook(before)
    hooks: Any = opt._optimizer_step_pre_hooks  # an OrderedDict
    hooks.move_to_end(handle.id, last=False)  # before `rewarm`, which scales the restored rate
