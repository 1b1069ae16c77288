"""Knots in experiment trackers, and as printed lines."""

import io
import logging
import math
import sys
import types

import pytest
import torch

from cola import ChainOptimizer, LinkConfig, StepKnots, log_to
from tests.models import BODY, Net, loss_of, train

NAMES = {f"knot/{name}" for name in ("index", "rank", "delta_norm", "share", "lost", "loss", "seconds")}


def run(*listeners, steps=5, **options):
    model, link = Net(), LinkConfig(r=2, target_modules=BODY)
    opt = ChainOptimizer(torch.optim.AdamW, model, policy=StepKnots(every=2), link=link, lr=0.01, **options)
    for listener in listeners:
        opt.on_knot(listener)
    train(opt, model, steps)
    opt.finish()
    return opt


def wanted(opt):
    """(step, numbers) of each knot."""
    reports = [(report.step, report.to_dict()) for report in opt.reports]
    return [(at, {f"knot/{k}": v for k, v in numbers.items() if k != "step"}) for at, numbers in reports]


class Run:
    """As a run of Weights & Biases."""

    def __init__(self):
        self.seen = []

    def log(self, data, step=None, commit=None):
        self.seen.append((step, data))


def mlflow_like(seen):
    """A module with mlflow's signature."""
    module = types.ModuleType("mlflow")

    def log_metrics(metrics, step=None, synchronous=None, run_id=None):
        seen.append((step, metrics))

    module.log_metrics = log_metrics
    return module


def wandb_like(run):
    module = types.ModuleType("wandb")
    module.run, module.log = run, lambda *args, **kwargs: pytest.fail("wandb.log is another function after wandb.init")
    return module


def test_a_function_gets_the_numbers_and_the_step():
    seen = []
    opt = run(log_to(lambda numbers, step: seen.append((step, numbers))))
    assert seen == wanted(opt)
    assert [at for at, _ in seen] == [2, 4, 5]
    assert all(numbers.keys() == NAMES for _, numbers in seen)


def test_weights_and_biases_as_a_run_and_as_a_module():
    mine = Run()
    module = wandb_like(mine)
    listener = log_to(module)
    module.log = mine.log  # as wandb.init does
    opt = run(log_to(mine), listener)
    assert mine.seen[::2] == mine.seen[1::2] == wanted(opt)
    with pytest.raises(RuntimeError, match=r"there is no run yet: call wandb\.init\(\) first"):
        log_to(wandb_like(None))


def test_mlflow():
    seen = []
    assert wanted(run(log_to(mlflow_like(seen)))) == seen


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        opt = run(log_to(writer))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == NAMES
    for name in NAMES:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(at, pytest.approx(numbers[name], rel=1e-6)) for at, numbers in wanted(opt)]  # stored in fp32


def test_what_is_not_known_is_left_out():
    seen, model = [], Net()
    opt = ChainOptimizer(
        torch.optim.SGD, model, policy=StepKnots(every=1), link=LinkConfig(r=1, target_modules=BODY), lr=0.1
    )
    opt.on_knot(log_to(lambda numbers, step: seen.append(numbers)))
    loss_of(model, 0).backward()  # of no output with a .loss, and nobody observes it
    opt.step()
    assert [numbers.keys() for numbers in seen] == [NAMES - {"knot/loss"}]


@pytest.mark.parametrize(
    "writer",
    [
        None,
        "runs/1",
        {},
        Run,
        logging.getLogger("x"),
        math,
        types.SimpleNamespace(log=lambda message: None),
        lambda numbers: None,
        [].append,
        math.log,
        torch.nn.Linear(2, 2),
    ],
    ids=["None", "path", "dict", "class", "logger", "math", "other log", "one argument", "list", "built in", "module"],
)
def test_anything_else_is_refused_in_words(writer):
    with pytest.raises(TypeError, match=r"log_to\(writer=.*needs an object with add_scalar .* or a function"):
        log_to(writer)


def test_a_verbose_run_prints_a_line_per_knot(capsys):
    opt = run(verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [str(report) for report in opt.reports]
    assert lines[0].startswith("knot 0 after step 2: rank 2, ‖ΔW‖ ")
    run()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("closed", [True, False])
def test_a_verbose_run_goes_on_without_an_output(monkeypatch, closed):
    stream = io.StringIO() if closed else None
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(verbose=True).reports


def test_a_verbose_run_goes_on_where_the_terminal_lacks_the_letters(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run(verbose=True)
    monkeypatch.undo()
    terminal.flush()
    assert b"knot 0 after step 2: rank 2, ??W? " in terminal.buffer.getvalue()


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_shows_knots(monkeypatch, capsys, rank):
    monkeypatch.setattr("cola.knot.log.writes", lambda: rank == 0)
    seen = []
    opt = run(log_to(lambda numbers, step: seen.append(step)), verbose=True)
    assert len(seen) == len(capsys.readouterr().out.splitlines()) == (len(opt.chain) if rank == 0 else 0)


def test_verbose_is_a_truth_value():
    with pytest.raises(TypeError, match=r"verbose='yes' must be True or False"):
        run(verbose="yes")
