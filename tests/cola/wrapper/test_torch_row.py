"""What torch's own tools do to an optimizer, done to a chain: scaling, clipping, checkpoints, averages, compile."""

import copy

import pytest
import torch
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cola import ChainOptimizer, LinkConfig, NeverKnots, StepKnots, restart, rewarm
from tests.models import BODY, Net, batch, loss_of, train

LINK = LinkConfig(r=2, lora_alpha=2, target_modules=BODY)


def chained(model=None, policy=None, base=torch.optim.AdamW, **kwargs):
    model = model or Net()
    kwargs = {"link": LINK, "lr": 0.02, **kwargs}
    return model, ChainOptimizer(base, model, policy or StepKnots(every=3), **kwargs)


def same(one, two):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_scaled_losses_train_as_plain_ones_through_knots(fused, clip):
    """Scales are powers of two, so scaling and unscaling are exact; clipping wants the unscaled gradients."""
    (plain, one), (model, two) = chained(fused=fused), chained(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(8):
        for m, o in ((plain, one), (model, two)):
            o.zero_grad()
            loss = loss_of(m, step)
            if o is one:
                loss.backward()
            else:
                scaler.scale(loss).backward()
                if clip or step % 2:  # by hand every other step, as clipping does
                    scaler.unscale_(o)
            if clip:
                torch.nn.utils.clip_grad_norm_(m.parameters(), clip)
            if o is one:
                o.step()
        scaler.step(two)
        scaler.update()
    assert len(two.chain) == len(one.chain) == 2
    assert same(plain, model)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("steps", [3, 4])
def test_distributed_checkpoints_hold_the_counters_even_when_flattened(flat, steps):
    """Also right after a knot, when the state is empty and torch takes a step with a rate of 0 to fill it."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    (model, opt), (plain, other) = chained(), chained()
    train(opt, model, steps), train(other, plain, steps)
    weights, state = dcp.get_state_dict(model, opt, options=options)
    weights, state = copy.deepcopy((dict(weights), dict(state)))
    resumed, again = chained()
    dcp.set_state_dict(resumed, again, model_state_dict=weights, optim_state_dict=state, options=options)
    assert (again.steps, again.live.index) == (steps, 1)
    losses = train(other, plain, 4, start=steps)
    assert train(opt, model, 4, start=steps) == losses
    assert train(again, resumed, 4, start=steps) == losses
    assert same(resumed, plain)


def test_a_scheduler_reaches_the_groups_that_a_loaded_state_brought():
    """``load_state_dict`` rebinds the base's groups; Accelerate calls it inside ``prepare``."""
    model, opt = chained()
    scheduler = schedules.StepLR(opt, 1, 0.5)
    train(opt, model, 1)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    scheduler.step()
    assert opt.base.param_groups[0]["lr"] == 0.01
    assert opt.param_groups is opt.base.param_groups


@pytest.mark.parametrize("after", ["continue", "rewarm", "restart"])
def test_a_plateau_scheduler_composes_with_what_happens_after_a_knot(after):
    model, opt = chained(policy=StepKnots(at=[4]))
    scheduler = schedules.ReduceLROnPlateau(opt, factor=0.5, patience=0)
    if after == "rewarm":
        rewarm(opt, steps=2)
    if after == "restart":
        restart(opt, scheduler)
    seen = []
    opt.base.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    for step in range(7):
        train(opt, model, 1, start=step)
        scheduler.step(1.0)  # never better: halved after every step but the first
    falling = [0.02, 0.02, 0.01, 0.005]
    rest = {
        "continue": [0.0025, 0.00125, 0.000625],
        "rewarm": [0.0025 / 3, 0.00125 * 2 / 3, 0.000625],  # a third of the rate, two thirds, all
        "restart": falling[:3],
    }
    assert seen == pytest.approx(falling + rest[after])


def test_a_trap_an_average_over_a_knot_is_of_two_links():
    """Averaged factors of two links are a third thing; begun anew at the knot the average is of one function."""
    model, opt = chained(policy=NeverKnots())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(opt, model, 5)
    average.update_parameters(model)
    x, _ = batch(0)
    opt.tie()
    function = model(x)
    stale = copy.deepcopy(average)
    for _ in range(3):
        stale.update_parameters(model)
    # the model has not changed since, and an average of one function with itself would be that function
    assert (stale(x) - function).abs().max() > 1e-3
    anew = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        anew.update_parameters(model)
    assert torch.allclose(anew(x), function, atol=1e-6)


class Counted:
    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
def test_a_compiled_base_step_is_traced_at_most_once_more_per_knot():
    """The base's state is made anew at a knot, so its first step is another graph; no knot in mid-graph is wrong."""
    (model, opt), (plain, other) = chained(policy=StepKnots(every=4)), chained(policy=StepKnots(every=4))
    backend = Counted()
    opt.base.step = torch.compile(opt.base.step, backend=backend)
    counts = []
    for step in range(12):
        train(opt, model, 1, start=step)
        counts.append(backend.graphs)
    train(other, plain, 12)
    assert len(opt.chain) == 3
    assert counts[0] > 0
    assert counts[11] - counts[3] <= 2
    # a traced step may fuse its products otherwise
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), plain.parameters()))


@pytest.mark.usefixtures("dynamo")
def test_a_scale_that_follows_a_masked_rank_adds_a_graph_once():
    """Scales are numbers in the graph: the first new one makes it a variable, and later ones add nothing."""
    model, backend = Net(), Counted()
    link = LinkConfig(r=(4, 3, 2, 1), lora_alpha=2, target_modules=BODY, rank_change="mask", scaling="alpha/r")
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=link, lr=0.02)
    compiled, counts = torch.compile(model, backend=backend), []
    for step in range(8):
        opt.zero_grad()
        x, y = batch(step)
        loss = (compiled(x) - y).square().mean()
        loss.backward()
        opt.step()
        counts.append(backend.graphs)
    assert len(opt.chain) == 4
    assert counts[3] - counts[1] <= counts[1]
    assert counts[7] == counts[3]
