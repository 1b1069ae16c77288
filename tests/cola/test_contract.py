"""What the ecosystem asks of an optimizer, and when a step is a step: the measured traps, each a test."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.optim.optimizer import register_optimizer_step_post_hook

from cola import ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from tests.cola.chain.chained import chained
from tests.models import BODY, Net, loss_of, tiny_opt, train

SCHEDULERS = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda e: 0.9**e),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=4),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=4), schedules.CosineAnnealingLR(o, 10)], [4]
    ),
    "StepLR": lambda o: schedules.StepLR(o, 3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_schedulers_see_and_set_the_bases_learning_rate_through_knots(name, base):
    _, opt = chained(base=base, momentum=0.9) if base is torch.optim.SGD else chained(base=base)
    plain = base([nn.Parameter(torch.zeros(1))], lr=0.02)
    ours, theirs = SCHEDULERS[name](opt), SCHEDULERS[name](plain)
    for step in range(10):
        loss_of(opt.model, step).backward()
        opt.step(), plain.step()
        ours.step(), theirs.step()
        assert opt.base.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert len(opt.chain) == 3


def test_reduce_on_plateau_goes_on_through_knots():
    _, opt = chained()
    plain = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.02)
    ours, theirs = (schedules.ReduceLROnPlateau(o, patience=1, factor=0.5) for o in (opt, plain))
    rates = []
    for step in range(10):
        loss_of(opt.model, step).backward()
        opt.step()
        ours.step(1.0), theirs.step(1.0)
        rates.append(opt.base.param_groups[0]["lr"])
        assert rates[-1] == plain.param_groups[0]["lr"]
    assert len(opt.chain) == 3
    assert rates[-1] == 0.02 / 2**4  # after steps 3, 5, 7 and 9, the first of them a knot


def test_what_is_loaded_still_belongs_to_the_base_and_to_the_scheduler():
    """torch rebinds ``state`` and ``param_groups`` when it loads, and Accelerate loads inside ``prepare``."""
    model, opt = chained(policy=StepKnots(at=[3]))
    scheduler = schedules.StepLR(opt, 1, gamma=0.5)
    train(opt, model, 4)
    for _ in range(2):
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert opt.param_groups is opt.base.param_groups
        assert opt.state is opt.base.state
        lr = opt.base.param_groups[0]["lr"]
        scheduler.step()
        assert opt.base.param_groups[0]["lr"] == lr / 2
        train(opt, model, 1, start=4)
    assert all(p in opt.state for p in opt.live.adapters())


def test_gradients_are_clipped_in_every_link():
    """Plain SGD with learning rate 1 moves by the gradient: by no more than what it was clipped to."""
    model, opt = chained(base=torch.optim.SGD, lr=1.0)
    for step in range(8):
        before = [p.detach().clone() for p in opt.live.adapters()]
        knots = len(opt.chain)
        opt.zero_grad()
        loss_of(model, step).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3, error_if_nonfinite=True)
        assert norm > 1e-3
        opt.step()
        if len(opt.chain) == knots:
            moved = sum((p - q).square().sum() for p, q in zip(opt.live.adapters(), before)).sqrt().item()
            assert moved == pytest.approx(1e-3, rel=1e-3)  # fp32 differences of values of about 1
    assert len(opt.chain) == 2


def test_an_average_of_weights_is_begun_anew_at_a_knot():
    """With A fixed, the mean of W + sBA is W + s·mean(B)·A within a link; over a knot it mixes B with another A."""
    from torch.optim.swa_utils import AveragedModel

    def effective(m):
        return m.first.weight + m.first.scaling * m.first.lora_B @ m.first.lora_A

    link = LinkConfig(r=2, lora_alpha=2, target_modules=BODY, train="B")
    model, opt = chained(policy=StepKnots(at=[3]), link=link)
    mixed, begun = AveragedModel(model), [AveragedModel(model)]
    opt.on_knot(lambda report: begun.append(AveragedModel(model)))
    weights = []
    for step in range(6):
        train(opt, model, 1, start=step)
        weights.append(effective(model).detach())
        mixed.update_parameters(model), begun[-1].update_parameters(model)
    assert len(begun) == 2
    after = torch.stack(weights[2:]).mean(0)  # the knot's step is the first of the new link
    # means of four fp32 values of about 1, once before and once after the product
    assert torch.allclose(effective(begun[-1].module), after, atol=8 * torch.finfo().eps)
    assert not torch.allclose(effective(mixed.module), torch.stack(weights).mean(0), atol=1e-3)


def test_steps_without_gradient_do_not_count():
    _, opt = chained(policy=StepKnots(every=1))
    opt.step()
    assert (opt.steps, len(opt.chain)) == (0, 0)


def test_a_warm_up_step_from_zero_counts_and_a_probe_does_not():
    model, opt = chained(policy=StepKnots(every=2))
    opt.param_groups[0]["lr"] = 0.0
    loss_of(model, 0).backward()
    opt.step()
    assert opt.steps == 1
    for p in opt.live.adapters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert opt.steps == 1


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.NAdam])
def test_a_probe_right_after_a_knot_leaves_the_run_as_it_was(base):
    """Distributed checkpointing takes a step with lr 0 and zero gradients when there is no state."""
    (disturbed, one), (plain, two) = chained(base=base), chained(base=base)
    for start in (0, 3, 6):
        for group in one.param_groups:
            lr, group["lr"] = group["lr"], 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
            one.step()
            group["lr"] = lr
        one.zero_grad()
        one.step()  # without any gradient: a probe that fills nothing, and forgets nothing
        train(one, disturbed, 3, start), train(two, plain, 3, start)
    assert one.steps == two.steps == 9
    assert all(torch.equal(p, q) for p, q in zip(disturbed.parameters(), plain.parameters()))


@pytest.mark.parametrize("fused", [True, False])
def test_loss_scaling_neither_breaks_nor_counts_skipped_steps(fused):
    model, opt = chained(fused=fused, policy=StepKnots(every=2))
    assert not hasattr(opt, "_step_supports_amp_scaling")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        opt.zero_grad()
        loss = loss_of(model, step)
        scaler.scale(loss).backward()
        if step == 1:
            model.first.lora_B.grad.fill_(float("inf"))
        scaler.step(opt)
        scaler.update()
    assert opt.steps == 3
    assert len(opt.chain) == 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_knot_before_backward_is_an_error_not_a_wrong_gradient():
    model, opt = chained()
    train(opt, model, 1)
    loss = loss_of(model, 0)
    opt.tie()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_step_hooks_run_once_each():
    calls = []
    handle = register_optimizer_step_post_hook(lambda o, a, k: calls.append("global"))
    model, opt = chained()
    opt.register_step_pre_hook(lambda o, a, k: calls.append("pre") if o is opt else None)
    opt.register_step_post_hook(lambda o, a, k: calls.append("post") if o is opt else None)
    opt.register_state_dict_post_hook(lambda o, s: calls.append("saved"))
    opt.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    train(opt, model, 1)
    opt.load_state_dict(opt.state_dict())
    handle.remove()
    assert calls == ["pre", "global", "post", "saved", "loaded"]


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize(
    "copying", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("steps", [2, 3])
def test_copies_go_on_alone(base, copying, steps):
    model, opt = chained(base=base)
    scheduler = schedules.StepLR(opt, 100)
    train(opt, model, steps)
    scheduler.step()
    twin_model, twin = copying((model, opt))
    frozen = copy.deepcopy(model.state_dict())
    losses = train(twin, twin_model, 5, start=steps)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in frozen.items())
    assert train(opt, model, 5, start=steps) == losses
    assert len(twin.chain) == len(opt.chain)


def test_copying_the_model_alone_does_not_take_the_optimizer_along():
    model = tiny_opt()
    ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LinkConfig(r=2), lr=0.1)
    assert b"ChainOptimizer" not in pickle.dumps(model)
    copy.deepcopy(model)


def test_added_groups_are_trained_and_never_reset():
    model, opt = chained()
    extra = nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [extra], "lr": 0.1})
    for step in range(4):
        opt.zero_grad()
        (loss_of(model, step) + extra.square().sum()).backward()
        opt.step()
    assert len(opt.chain) == 1
    assert opt.state[extra]["step"].item() == 4
    assert len(opt.param_groups) == 2


def test_replaced_parameters_are_noticed_at_the_knot():
    _, opt = chained()
    opt.param_groups[0]["params"] = [nn.Parameter(p.detach().clone()) for p in opt.param_groups[0]["params"]]
    with pytest.raises(RuntimeError, match="param_groups do not hold lora_A of layer 'first'"):
        opt.tie()


def test_a_knot_is_one_line_of_logging_and_a_report(caplog):
    reports = []
    model, opt = chained(policy=StepKnots(at=[4]))
    assert opt.on_knot(reports.append) == reports.append
    with caplog.at_level(logging.INFO, logger="cola"):
        for step in range(6):
            opt.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            opt.observe(loss)
            opt.step()
            if step == 3:
                last = loss.item()
    assert [r.message for r in caplog.records if r.levelno == logging.INFO] == [str(reports[0])]
    report = reports[0]
    assert (report.index, report.step, report.rank, report.loss) == (0, 4, 2, last)
    link = opt.chain[0]
    assert report.delta_norm == pytest.approx(sum(f.norm() ** 2 for f in link.factors.values()) ** 0.5)
    assert set(report.layers) == set(BODY)
    assert 0 < report.lost_norm < 1e-6 * report.delta_norm
    assert report.seconds > 0
    assert link.report is report


@pytest.mark.parametrize(("size", "warns"), [(0.049, 1), (0.051, 0)])
def test_the_first_knot_that_moves_a_layer_far_warns(size, warns, caplog):
    model, opt = chained(policy=NeverKnots())
    for layer in opt.live.layers.values():
        with torch.no_grad():
            layer.lora_A.zero_()[0, 0] = 1
            layer.lora_B[0, 0] = (size if layer is model.second else 0.01) * layer.weight.norm() / layer.scaling
    for _ in range(3):
        with torch.no_grad():
            model.second.lora_B[0, 0] = model.second.lora_B[0, 0] or 9.0
        report = opt.tie()
    first = opt.chain[0].report
    # ‖W‖ after the tie is within ‖ΔW‖ of ‖W‖ before
    assert first.share == first.layers["second"].share == pytest.approx(size, rel=size)
    assert f"(at most {100 * first.share:.2g} % of a layer's ‖W‖)" in str(first)
    assert report.share > 0.5
    (told,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    share = opt.reports[warns].share
    assert told.startswith(f"link {warns} changed layer 'second' by {100 * share:.1f} % of ‖W‖")


@pytest.mark.parametrize("links", [1, 2])
def test_a_last_link_that_moves_a_layer_far_warns_unless_it_is_the_only_one(links, caplog):
    model, opt = chained(policy=NeverKnots())
    for _ in range(links - 1):
        opt.tie()
    with torch.no_grad():
        model.second.lora_B.fill_(9.0)
    opt.finish()
    assert ("link 1 changed layer 'second'" in caplog.text) == (links == 2)


def test_knots_that_a_run_does_not_reach_are_mentioned(caplog):
    model, opt = chained(policy=StepKnots(at=[2, 50]))
    train(opt, model, 4)
    opt.finish()
    assert "had still planned knots after steps [50]" in caplog.text


def test_unkept_links_are_counted_and_cannot_be_applied():
    model, opt = chained(keep_links=False)
    train(opt, model, 7)
    opt.finish()
    assert len(opt.chain) == 3
    with pytest.raises(RuntimeError, match="keep_links=False"):
        opt.chain.apply(Net())


def test_repr_names_link_policy_and_base():
    _, opt = chained()
    assert repr(opt).startswith("ChainOptimizer(link 0, r=2, StepKnots(")
    assert "AdamW" in repr(opt)
