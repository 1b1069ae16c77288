"""Every call that a framework may make on an optimizer works or is refused in words, at every stage of its life."""

import contextlib
import copy
import io
import logging
import pickle
import re

import pytest
import torch
from torch import nn

from cola import Chain, ChainOptimizer, LinkConfig, StepKnots
from tests.models import BODY, Net, loss_of, train

LINK = LinkConfig(r=2, lora_alpha=2, target_modules=BODY, modules_to_save=["head"])
#: the calls that may be refused, by words that the message must have
REFUSAL = r"finish\(\)|finished|knot|untouched|before the first|own state dict|step|links|running"


def made(model=None):
    model = model or Net()
    return model, ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=3), link=LINK, lr=0.02)


def after(steps):
    model, opt = made()
    train(opt, model, steps)
    return model, opt


def backward():
    model, opt = made()
    loss_of(model, 0).backward()
    return model, opt


def failed_knot():
    model, opt = after(4)
    with torch.no_grad():
        model.first.lora_A[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="is not tied"):
        opt.tie()
    with torch.no_grad():
        model.first.lora_A[0, 0] = 0.5
    return model, opt


def finished(steps=4, **kwargs):
    model, opt = after(steps)
    opt.finish(**kwargs)
    return model, opt


def loaded(tmp_path):
    _, opt = after(4)
    opt.save(tmp_path / "stage")
    model, again = made()
    again.load(tmp_path / "stage")
    return model, again


def loaded_states():
    there, opt = after(4)
    model, again = made()
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    model.load_state_dict(there.state_dict())
    return model, again


def copied(stage, copying):
    return lambda tmp_path: copying(STAGES[stage](tmp_path))


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


STAGES = {
    "fresh": lambda tmp_path: made(),
    "after a backward": lambda tmp_path: backward(),
    "after a step": lambda tmp_path: after(1),
    "right after a knot": lambda tmp_path: after(3),
    "in the second link": lambda tmp_path: after(4),
    "after a failed knot": lambda tmp_path: failed_knot(),
    "after load": loaded,
    "after loaded states": lambda tmp_path: loaded_states(),
    "finished": lambda tmp_path: finished(),
    "finished, fresh": lambda tmp_path: finished(0),
    "finished at a knot": lambda tmp_path: finished(3),
    "finished, dropped": lambda tmp_path: finished(merge=False),
    "pickled": copied("in the second link", pickled),
    "copied": copied("in the second link", copy.deepcopy),
    "pickled, finished": copied("finished", pickled),
    "copied, finished": copied("finished", copy.deepcopy),
}


def zero_grad(model, opt, tmp_path, set_to_none):
    opt.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None or not p.grad.any() for group in opt.param_groups for p in group["params"])


def groups(model, opt, tmp_path):
    assert opt.param_groups is opt.base.param_groups
    opt.param_groups = opt.param_groups
    opt.state, opt.defaults = opt.state, opt.defaults
    opt.param_groups[0]["lr"] = 0.01
    assert opt.base.param_groups[0]["lr"] == 0.01


def words(model, opt, tmp_path):
    text = repr(opt)
    assert text == str(opt)
    assert ("finished with" in text) == opt.finished


def through_torch_save(model, opt, tmp_path):
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def own_state(model, opt, tmp_path):
    """Loading what it has just said of itself changes nothing that is said."""
    links = repr(opt.chain)
    state = through_torch_save(model, opt, tmp_path)
    before = opt.param_groups[0]["cola"]
    opt.load_state_dict(state)
    opt.state_dict()
    assert (opt.param_groups[0]["cola"], repr(opt.chain)) == (before, links)


def another_state(stage):
    def call(model, opt, tmp_path):
        _, other = STAGES[stage](tmp_path / "other")
        opt.load_state_dict(copy.deepcopy(other.state_dict()))

    return call


def plain_state(model, opt, tmp_path):
    plain = torch.optim.AdamW(Net().parameters(), lr=0.02)
    with pytest.raises(ValueError, match="not saved by a ChainOptimizer"):
        opt.load_state_dict(plain.state_dict())


def hooks(model, opt, tmp_path):
    calls = []
    handles = [
        opt.register_step_pre_hook(lambda *_: calls.append("step")),
        opt.register_step_post_hook(lambda *_: calls.append("stepped")),
        opt.register_state_dict_pre_hook(lambda *_: calls.append("save")),
        opt.register_state_dict_post_hook(lambda *_: calls.append("saved")),
        opt.register_load_state_dict_pre_hook(lambda *_: calls.append("load")),
        opt.register_load_state_dict_post_hook(lambda *_: calls.append("loaded")),
    ]
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert calls == ["save", "saved", "load", "loaded"]
    for handle in handles:
        handle.remove()


def step(model, opt, tmp_path):
    loss_of(model, 5).backward()
    opt.step()


def step_with_closure(model, opt, tmp_path):
    def closure():
        opt.zero_grad()
        loss = loss_of(model, 5)
        loss.backward()
        return loss

    opt.step(closure)


def scheduled(model, opt, tmp_path):
    opt.zero_grad()
    schedulers = torch.optim.lr_scheduler
    for make in (
        lambda o: schedulers.StepLR(o, 1),
        lambda o: schedulers.LambdaLR(o, lambda step: 0.5),
        lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=10),
    ):
        scheduler = make(opt)
        with pytest.warns(UserWarning, match="lr_scheduler.step"):  # before a step
            scheduler.step()
        scheduler.load_state_dict(scheduler.state_dict())


def scaled(model, opt, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    opt.zero_grad()
    scaler.scale(loss_of(model, 5)).backward()
    scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()


def accelerated(model, opt, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)
    wrapped = AcceleratedOptimizer(opt)  # loads the optimizer's own state
    wrapped.zero_grad()
    wrapped.train(), wrapped.eval(), wrapped.train()
    assert wrapped.param_groups is opt.param_groups
    wrapped.load_state_dict(wrapped.state_dict())


def copies(model, opt, tmp_path):
    for copying in (copy.deepcopy, pickled):
        twin_model, twin = copying((model, opt))
        assert repr(twin.chain) == repr(opt.chain)
        assert twin.live.model is twin_model
        twin.state_dict()


def distributed_checkpointing(model, opt, tmp_path):
    from torch.distributed.checkpoint import state_dict as dcp

    opt.zero_grad()
    state = dcp.get_optimizer_state_dict(model, opt)  # takes a probe step where there is no state
    if not opt.finished and all(p in opt.state for p in opt.live.adapters()):  # torch refuses half a state by name
        dcp.set_optimizer_state_dict(model, opt, state)


def chain(model, opt, tmp_path):
    opt.chain.save(tmp_path / "chain")
    assert repr(Chain.load(tmp_path / "chain")) == repr(opt.chain).replace(", and a live one", "")
    opt.chain.load_state_dict(opt.chain.state_dict())


#: calls that must work at any stage
ALWAYS = {
    "repr": words,
    "state_dict, weights_only": through_torch_save,
    "load_state_dict, own": own_state,
    "load_state_dict, a plain optimizer's": plain_state,
    "zero_grad": lambda *a: zero_grad(*a, set_to_none=True),
    "zero_grad to zeros": lambda *a: zero_grad(*a, set_to_none=False),
    "groups, state, defaults": groups,
    "hooks": hooks,
    "modes": lambda model, opt, tmp_path: (opt.eval(), opt.train()),
    "schedulers": scheduled,
    "AcceleratedOptimizer": accelerated,
    "copies": copies,
    "distributed checkpointing": distributed_checkpointing,
    "chain": chain,
}
#: calls that are refused in words at some stages, and leave everything as it was then
IN_TIME = {
    "step": step,
    "step with a closure": step_with_closure,
    "GradScaler": scaled,
    "observe": lambda model, opt, tmp_path: opt.observe(1.0, epoch=1),
    "on_knot": lambda model, opt, tmp_path: opt.on_knot(print),
    "tie": lambda model, opt, tmp_path: opt.tie(),
    "finish": lambda model, opt, tmp_path: opt.finish(),
    "finish, dropping": lambda model, opt, tmp_path: opt.finish(merge=False),
    "save": lambda model, opt, tmp_path: opt.save(tmp_path / "run"),
    "load": lambda model, opt, tmp_path: (after(4)[1].save(tmp_path / "run"), opt.load(tmp_path / "run")),
    "undo": lambda model, opt, tmp_path: opt.undo(Net()),
    "follow": lambda model, opt, tmp_path: opt.follow(Chain()),
    "add_param_group": lambda model, opt, tmp_path: opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
    **{
        f"load_state_dict, {stage}": another_state(stage)
        for stage in ("after a step", "in the second link", "finished")
    },
}


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, logger="cola")


@pytest.mark.parametrize("call", ALWAYS)
@pytest.mark.parametrize("stage", STAGES)
def test_what_frameworks_call_at_any_time_works_at_any_stage(stage, call, tmp_path):
    ALWAYS[call](*STAGES[stage](tmp_path), tmp_path)


def everything(model, opt):
    """What must not change when a call is refused."""
    opt.state_dict()
    state = opt.base.state_dict()
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        repr(opt.chain),
        opt.finished,
        opt.steps,
        [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]],
        {type(module) for module in model.modules()},
    )


@pytest.mark.parametrize("call", IN_TIME)
@pytest.mark.parametrize("stage", STAGES)
def test_other_calls_work_or_are_refused_in_words(stage, call, tmp_path):
    model, opt = STAGES[stage](tmp_path)
    before = everything(model, opt)
    refusal = None
    try:
        IN_TIME[call](model, opt, tmp_path)
    except (RuntimeError, ValueError) as error:
        refusal = str(error)
    if refusal is not None:
        assert re.search(REFUSAL, refusal), refusal
        now = everything(model, opt)
        assert all(torch.equal(value, now[0][name]) for name, value in before[0].items())
        assert before[1:] == now[1:]
    else:
        assert not opt.finished or call in ("finish", "finish, dropping", "GradScaler", "load_state_dict, finished")
    # and the run goes on, or is over
    if not opt.finished and not call.startswith("load_state_dict"):
        train(opt, model, 4, start=6)
        opt.finish()
    if not call.startswith("load_state_dict"):
        assert [type(m) for m in model.modules()] == [type(m) for m in Net().modules()]
    assert repr(opt)
    opt.state_dict()


@pytest.mark.parametrize("call", [*ALWAYS, *IN_TIME])
def test_a_listener_may_read_and_is_refused_to_change(call, tmp_path):
    """In the middle of a knot's announcement the run is whole: what reads it works, what turns it back is refused."""
    model, opt = made()
    seen = []

    @opt.on_knot
    def listener(report):
        if seen or call in ("copies", "step", "step with a closure", "GradScaler", "schedulers"):
            return
        seen.append(report)
        try:
            {**ALWAYS, **IN_TIME}[call](model, opt, tmp_path)
        except (RuntimeError, ValueError) as error:
            seen.append(str(error))

    with contextlib.suppress(AssertionError):
        train(opt, model, 3)
    train(opt, model, 3, start=3)
    changing = ("tie", "finish", "load", "undo", "follow", "hooks", "AcceleratedOptimizer")
    if call.startswith(changing):
        assert "a listener of on_knot" in seen[1]
    elif call not in ("load_state_dict, a plain optimizer's",):
        assert len(seen) <= 1, seen
    assert len(opt.chain) == 2
    opt.finish()


# a finished chain's state


@pytest.mark.parametrize("kwargs", [{}, {"merge": False}])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_finished_chain_takes_a_finished_state_and_gets_the_links(kwargs, dropped):
    model, opt = finished(7, **kwargs)
    state = copy.deepcopy(opt.state_dict())
    if dropped:
        del state["cola"]  # as distributed checkpointing does
    again_model, again = made()
    again.finish()
    with pytest.raises(ValueError, match="load the model's own state dict first"):
        again.load_state_dict(copy.deepcopy(state))
    assert (again.steps, len(again.chain)) == (0, 0)
    again_model.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(state))
    assert again.steps == 7
    assert again.chain.missing + len(again.chain) == len(opt.chain)
    if not dropped:
        base = Net()
        again.chain.apply(base)
        if not kwargs:
            assert all(torch.equal(p, q) for p, q in zip(base.parameters(), model.parameters()))


def test_states_of_running_and_finished_chains_are_told_apart():
    _, running = after(4)
    _, ended = finished(4)
    with pytest.raises(
        ValueError, match=r"saved after finish\(\), when its chain was complete, and this one is running"
    ):
        after(0)[1].load_state_dict(copy.deepcopy(ended.state_dict()))
    with pytest.raises(ValueError, match="of a running chain, and this one is finished"):
        ended.load_state_dict(copy.deepcopy(running.state_dict()))


def test_a_state_taken_before_the_weights_have_come_still_tells_which_they_are():
    model, opt = after(4)
    weights = copy.deepcopy(model.state_dict())
    _, between = made()
    between.load_state_dict(copy.deepcopy(opt.state_dict()))
    passed_on = copy.deepcopy(between.state_dict())  # Accelerate does so in prepare()
    last_model, last = made()
    last.load_state_dict(passed_on)
    with pytest.raises(RuntimeError, match="load the model's own state dict too"):
        train(last, last_model, 1, start=4)
    with pytest.raises(RuntimeError, match="load the model's own state dict too"):
        between.save("never written")
    last_model.load_state_dict(weights)
    assert train(last, last_model, 3, start=4) == train(opt, model, 3, start=4)


def test_a_finished_optimizer_keeps_its_groups_and_lets_the_factors_go():
    model, opt = after(4)
    opt.add_param_group({"params": [extra := nn.Parameter(torch.ones(2))]})
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    held = opt.param_groups
    opt.finish()
    assert opt.param_groups is held
    assert [len(group["params"]) for group in held] == [0, 2, 1]
    assert held[2]["params"][0] is extra
    assert set(opt.state) == {model.head.weight, model.head.bias}
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()
    model(torch.ones(1, 6)).sum().backward()
    with pytest.raises(RuntimeError, match=r"step\(\) after finish\(\)"):
        opt.step()


# whole frameworks


def test_lightning_saves_a_checkpoint_after_fit(tmp_path):
    lightning = pytest.importorskip("lightning")
    from cola.integrations.lightning import ChainKnots

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.chain_optimizer = made()

        def configure_optimizers(self):
            scheduler = torch.optim.lr_scheduler.StepLR(self.chain_optimizer, 1)
            return {"optimizer": self.chain_optimizer, "lr_scheduler": scheduler}

        def training_step(self, batch, index):
            return loss_of(self.net, index)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[ChainKnots()], default_root_dir=tmp_path,
    )  # fmt: skip
    lit = Lit()
    trainer.fit(lit, torch.utils.data.DataLoader(range(5)))
    assert lit.chain_optimizer.finished
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert not any("lora" in name for name in saved["state_dict"])
    _, again = made(copy.deepcopy(lit.net))
    again.finish()
    again.load_state_dict(saved["optimizer_states"][0])
    assert repr(again.chain) == repr(lit.chain_optimizer.chain)


def test_accelerate_saves_and_loads_the_state_after_finish(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, opt = made()
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    model, wrapped, scheduler = accelerator.prepare(model, opt, scheduler)
    for number in range(4):
        loss_of(model, number).backward()
        wrapped.step(), scheduler.step(), wrapped.zero_grad()
    opt.finish()
    accelerator.save_state(tmp_path / "end")
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.first.weight.zero_()
    accelerator.load_state(tmp_path / "end")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    assert len(opt.chain) == 2
    repr(wrapped)
