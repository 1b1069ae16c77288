"""A cell of the paper's experiments: the protocol's training, the best epoch, kills, and the command that runs one."""

import argparse
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, TrainerState

from cola import Chain
from cola.integrations.transformers import ChainCallback
from experiments import models, tasks
from experiments.__main__ import main
from experiments.methods import Method
from experiments.paper import finetune, tables
from experiments.paper import run as run_command
from experiments.paper.cells import Cell, name, usual_dtype
from experiments.paper.encoding import Encoder
from experiments.paper.objectives import examples
from experiments.paper.scoring import dev_loss, evaluate
from experiments.sweep import OUTCOME, SCRATCH, Sweep, sweep
from experiments.tasks.loading import split
from tests.experiments import small
from tests.launch import launch

ROOT = Path(__file__).parents[3]
WORDS = ("tin", "rome", "film", "rain", "answer", "great", "terrible", "old")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random OPT with its tokenizer, and rows of two tasks."""
    folder = tmp_path_factory.mktemp("experiment")
    small.model("opt", torch.float32).save_pretrained(folder / "model")
    small.tokenizer().save_pretrained(folder / "model")
    for task in ("SST-2", "COPA"):
        (folder / "data" / task).mkdir(parents=True)
        for split_name, count in (("train", 24), ("validation", 8), ("test", 8)):
            lines = "".join(json.dumps(row(task, i)) + "\n" for i in range(count))
            (folder / "data" / task / f"{split_name}.jsonl").write_text(lines)
    return folder


def row(task, i):
    word, other = WORDS[i % 8], WORDS[(3 * i + 1) % 8]
    if task == "SST-2":
        return {"sentence": f"{word} and {other} number {i}", "label": i % 2}
    return {"premise": f"The {word} was {i}.", "choice1": f"It was {other}.", "choice2": f"{word} it is.",
            "question": "cause" if i % 3 else "effect", "label": i % 2}  # fmt: skip


def cell(folder, method=None, **changes):
    method = method or Method.cola(2, ranks=(2,))
    base = Cell(str(folder / "model"), "SST-2", method, 1e-2, 0, train=16, dev=8, test=8, epochs=3,
                data_dir=str(folder / "data"), max_length=64)  # fmt: skip
    return dataclasses.replace(base, **changes)


def as_text(cell):
    return json.dumps(dataclasses.asdict(cell))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": Method.lora(2)},
        {"method": Method.cola(2, ranks=(4, 2)), "bias": True},
        {"method": Method.cola(2, ranks=(2,), knots="plateau"), "task": "COPA"},
        {"method": Method.cola(3, ranks=(2,), base="SGD"), "targets": ("fc1", "fc2"), "dtype": "bfloat16"},
        {"method": Method("finetune", base="Adagrad"), "task": "COPA", "gradient_checkpointing": True},
    ],
)
def test_an_outcome_is_what_the_weights_give(folder, tmp_path, changes):
    """The chain applied to the untouched model has the scores and the lowest development loss that are reported."""
    of = cell(folder, **changes)
    outcome = finetune.run(of, tmp_path)
    assert len(outcome["losses"]) == outcome["steps"] == 6
    assert len(outcome["dev_loss_by_epoch"]) == 3
    assert outcome["dev_loss_by_epoch"][outcome["best_epoch"] - 1] == min(outcome["dev_loss_by_epoch"])
    assert outcome == json.loads(json.dumps(outcome))
    if not of.method.adapts:
        assert not (tmp_path / "chain").exists()
        return
    model, tokenizer = models.load(of.model, of.dtype, device="cpu")
    chain = Chain.load(tmp_path / "chain")
    chain.apply(model)
    task = tasks.task(of.task)
    splits = split(task, of.seed, of.train, of.dev, of.test, of.data_dir)
    for part in ("dev", "test"):
        score = evaluate(model, tokenizer, task, getattr(splits, part), batch_size=of.batch, max_length=64)
        assert score.value == outcome[part]
    loss = dev_loss(model, tokenizer, task, splits.dev, batch_size=of.batch, max_length=64)
    # the last link was not merged when the loss was taken: as many roundings as it has layers
    eps = torch.finfo(torch.bfloat16 if of.dtype == "bfloat16" else torch.float32).eps
    assert loss == pytest.approx(min(outcome["dev_loss_by_epoch"]), rel=16 * eps)
    knots_before_the_best = [k for k in outcome["knots"] if k["step"] < 2 * outcome["best_epoch"]]
    assert len(chain) in (len(knots_before_the_best) + 1, len(knots_before_the_best))


def test_knots_and_tokens_of_a_chain(folder, tmp_path):
    of = cell(folder, Method.cola(3, ranks=(4, 2, 1)))
    outcome = finetune.run(of, tmp_path)
    assert [(knot["step"], knot["rank"]) for knot in outcome["knots"]] == [(2, 4), (4, 2)]
    _, tokenizer = models.load(of.model, device="cpu")
    task = tasks.task(of.task)
    items = examples(task, split(task, 0, 16, 8, 8, of.data_dir).train, Encoder(tokenizer, 64))
    in_epoch = sum(len(text.ids) - 1 for item in items for text in item.texts)
    assert outcome["tokens_by_link"] == [in_epoch] * 3


@pytest.mark.parametrize(
    ("configuration", "drops"),
    [
        ({"model_type": "opt"}, True),
        ({"model_type": "opt", "dropout": 0.0, "layerdrop": 0.1}, True),
        ({"model_type": "opt", "dropout": 0.0}, False),
        ({"model_type": "gpt2"}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "llama", "attention_dropout": 0.1}, True),
        ({"model_type": "opt", "dropout": 0}, False),
        ({"model_type": "opt", "dropout": 1}, True),
        ({"model_type": "gemma3", "text_config": {"attention_dropout": 0.1}}, True),
        ({"model_type": "gemma3"}, False),
    ],
)
def test_candidates_share_a_context_only_where_nothing_is_dropped(configuration, drops):
    model = torch.nn.Module()
    model.config = AutoConfig.for_model(**configuration)
    assert finetune._drops_out(model) is drops


def test_mixed_precision_trains_fp32_weights(folder, tmp_path):
    """bf16 arithmetic: the outcome differs from fp32's, and the chain has updates that bf16 weights could not hold."""
    of = cell(folder, Method.cola(2, ranks=(2,)), dtype="bf16-mixed")
    outcome = finetune.run(of, tmp_path / "mixed")
    plain = finetune.run(cell(folder, Method.cola(2, ranks=(2,))), tmp_path / "plain")
    assert outcome["losses"] != plain["losses"]
    # every product is rounded to eight bits, of which a few agree over so small a model
    assert outcome["losses"][0] == pytest.approx(plain["losses"][0], rel=0.1)
    model, _ = models.load(of.model, device="cpu")
    before = {name: p.clone() for name, p in model.named_parameters()}
    Chain.load(tmp_path / "mixed" / "chain").apply(model)
    moved = {name: p for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(p.dtype == torch.float32 for p in moved.values())
    assert any(not torch.equal(p, p.bfloat16().float()) for p in moved.values())


def test_the_rate_falls_linearly_and_gradients_are_clipped(folder, tmp_path):
    arguments = finetune.training_arguments(cell(folder), tmp_path, 4)
    assert arguments.lr_scheduler_type == "linear"
    assert (arguments.warmup_steps, arguments.weight_decay, arguments.max_grad_norm) == (0, 0.0, 1.0)
    assert arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size == 8


def test_several_gpus_do_not_make_the_batch_larger(folder, tmp_path, monkeypatch):
    class OnFour(finetune.TrainingArguments):
        @property
        def _setup_devices(self):
            self.__dict__.setdefault("_n_gpu", 4)
            return torch.device("cpu")

    monkeypatch.setattr(finetune, "TrainingArguments", OnFour)
    assert OnFour(str(tmp_path), per_device_train_batch_size=8).train_batch_size == 32
    assert finetune.training_arguments(cell(folder), tmp_path, 8).train_batch_size == 8


def test_accumulated_steps_are_those_of_whole_batches(folder, tmp_path, monkeypatch):
    whole = finetune.run(cell(folder, Method("finetune"), epochs=1, lr=1e-4), tmp_path / "whole")
    monkeypatch.setattr(finetune, "micro_batch", lambda size, batch: 2)
    parts = finetune.run(cell(folder, Method("finetune"), epochs=1, lr=1e-4), tmp_path / "parts")
    # sums in another order: two classes and four micro-batches of fp32 terms, and a step that follows them
    assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-4)


@pytest.mark.parametrize("method", [Method.cola(2, ranks=(4, 2)), Method("finetune")], ids=["cola", "finetune"])
def test_a_killed_run_goes_on_bit_for_bit(folder, tmp_path, method):
    of = cell(folder, method, epochs=4)
    whole = Sweep(tmp_path / "whole", finetune.run, name)
    undisturbed = whole.carry_out(lambda done: [of], workers=1, progress=False)[of]
    killed = Sweep(tmp_path / "killed", finetune.run, name)
    command = [sys.executable, "-m", "tests.experiments.paper.torchrun_cell", str(tmp_path / "killed"), as_text(of)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    scratch = killed.place(of) / SCRATCH
    while process.poll() is None and not list(scratch.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed.place(of) / OUTCOME).exists()
    assert killed.carry_out(lambda done: [of], workers=1, progress=False)[of] == undisturbed
    if method.adapts:
        require_same_chains(*(s.place(of) / "chain" for s in (whole, killed)))


def require_same_chains(*folders):
    one, two = (
        # the rest of a name is of the contents, and a report has the seconds that a knot took
        {path.name[:10]: load_file(path) for path in sorted(folder.glob("link-*"))}
        for folder in folders
    )
    assert one.keys() == two.keys() != set()
    assert all(torch.equal(one[file][key], two[file][key]) for file in one for key in one[file])


class Killed(BaseException):
    """Stops a run where it stands, as a kill would."""


def killed(*args, **kwargs):
    raise Killed


def half_of_it(state, path):
    whole = json.dumps(dataclasses.asdict(state))
    Path(path).write_text(whole[: len(whole) // 2])
    raise Killed


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A cell of four epochs with a knot, and its outcome."""
    of = cell(folder, Method.cola(2, ranks=(4, 2)), epochs=4)
    return of, finetune.run(of, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("where", "what", "does"),
    [
        (finetune.TaskTrainer, "_save_optimizer_and_scheduler", killed),
        (finetune.TaskTrainer, "_save_rng_state", killed),
        (TrainerState, "save_to_json", half_of_it),
        (ChainCallback, "on_save", killed),
        (finetune, "evaluate", killed),
        (finetune, "_keep_chain", killed),
    ],
    ids=["weights alone", "no state", "half a state", "no chain", "before the scores", "after the scores"],
)
def test_what_was_not_written_whole_is_not_gone_on_from(folder, whole, tmp_path, monkeypatch, where, what, does):
    of, undisturbed = whole
    original, calls = getattr(where, what), []

    def third(*args, **kwargs):
        calls.append(None)
        # the third checkpoint is the first one behind the knot
        if len(calls) < (3 if isinstance(where, type) else 1):
            return original(*args, **kwargs)
        return does(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, what, third)
        with pytest.raises(Killed):
            finetune.run(of, tmp_path / "cut")
    steps = []
    train_step = finetune.TaskTrainer.training_step
    monkeypatch.setattr(finetune.TaskTrainer, "training_step", lambda *a, **k: steps.append(0) or train_step(*a, **k))
    assert finetune.run(of, tmp_path / "cut") == undisturbed
    # two epochs of two steps were whole, or all four of them
    assert len(steps) == (4 if isinstance(where, type) else 0)


@pytest.mark.parametrize(("where", "again"), [("write_atomically", True), ("_clear", False)])
def test_a_kill_around_the_outcome_repeats_no_step(folder, tmp_path, monkeypatch, where, again):
    """Before it is written the run is scored again, from its last checkpoint; after it, found; then cleared up."""
    of = cell(folder, Method.cola(2, ranks=(4, 2)), epochs=4)
    whole = Sweep(tmp_path / "whole", finetune.run, name)
    undisturbed = whole.carry_out(lambda done: [of], workers=1, progress=False)[of]
    cut = Sweep(tmp_path / "cut", finetune.run, name)
    with monkeypatch.context() as patch:
        patch.setattr(sweep, where, killed)
        with pytest.raises(Killed):
            cut.carry_out(lambda done: [of], workers=1, progress=False)
    assert (cut.read(of) is None) == again
    assert (cut.place(of) / SCRATCH).exists()
    steps, scored = [], []
    train_step, evaluate = finetune.TaskTrainer.training_step, finetune.evaluate
    monkeypatch.setattr(finetune.TaskTrainer, "training_step", lambda *a, **k: steps.append(0) or train_step(*a, **k))
    monkeypatch.setattr(finetune, "evaluate", lambda *a, **k: scored.append(0) or evaluate(*a, **k))
    assert cut.carry_out(lambda done: [of], workers=1, progress=False)[of] == undisturbed
    assert (len(steps), len(scored)) == (0, 2 if again else 0)
    assert {path.name for path in cut.place(of).iterdir()} == {"chain", OUTCOME}
    require_same_chains(whole.place(of) / "chain", cut.place(of) / "chain")


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "fsdp"), [(Method.cola(2, ranks=(2,)), True), (Method("finetune"), False)], ids=["cola", "finetune"]
)
def test_processes_share_a_cell(folder, tmp_path, method, fsdp):
    """Two processes, each with half of every batch, under DDP and FSDP2, take the steps of one."""
    alone = finetune.run(cell(folder, method), tmp_path / "alone")
    of = cell(folder, method, fsdp=fsdp)
    launch("tests.experiments.paper.torchrun_cell", tmp_path, as_text(of))
    together = Sweep(tmp_path, finetune.run, name).read(of)
    assert together.keys() == alone.keys()
    for key in ("steps", "tokens_by_link", "best_epoch"):
        assert together[key] == alone[key]
    assert [knot["step"] for knot in together["knots"]] == [knot["step"] for knot in alone["knots"]]
    # a classification loss is a mean over examples, so halves of a batch average to it: rounding in six AdamW steps
    assert together["dev_loss_by_epoch"] == pytest.approx(alone["dev_loss_by_epoch"], rel=1e-4)
    if method.adapts:
        assert len(Chain.load(Sweep(tmp_path, finetune.run, name).place(of) / "chain")) == 2


def test_prompting_trains_nothing(folder, tmp_path):
    zero = finetune.run(cell(folder, Method("zero-shot"), lr=0.0), tmp_path)
    shown = finetune.run(cell(folder, Method("icl"), lr=0.0, max_length=256), tmp_path)
    assert set(zero) == set(shown) == {"test", "metrics"}
    model, tokenizer = models.load(str(folder / "model"), device="cpu")
    task = tasks.task("SST-2")
    splits = split(task, 0, 16, 8, 8, folder / "data")
    demonstrations = split(task, 0, 32, 0, 1, folder / "data").train
    for outcome, solved, length in ((zero, (), 64), (shown, demonstrations, 256)):
        score = evaluate(model, tokenizer, task, splits.test, batch_size=8, demonstrations=solved, max_length=length)
        assert outcome["test"] == score.value


def test_prompting_needs_the_test_pool_alone(folder, tmp_path):
    """Of 24 rows, three files or two, a development set would leave none to train on."""
    assert "test" in finetune.run(cell(folder, Method("zero-shot"), lr=0.0, train=1000, dev=500), tmp_path)
    data = tmp_path / "data" / "sst2"
    data.mkdir(parents=True)
    for part in ("train", "validation"):
        shutil.copy(folder / "data" / "SST-2" / f"{part}.jsonl", data)
    of = cell(folder, Method("zero-shot"), lr=0.0, train=1000, dev=500, data_dir=str(data.parent))
    assert "test" in finetune.run(of, tmp_path)


@pytest.mark.parametrize(("number", "line", "typed"), [
    (3, "length 3", "--task rte --method cola --links 3 --lr 1e-3"),
    (5, "LoRA, SGD", "--task cb --method lora --base SGD --lr 1e-3"),
    (2, "COLA", "--model meta-llama/Llama-2-7b-hf --task rte --method cola --lr 1e-3"),
    (2, "Finetune", "--model meta-llama/Llama-2-7b-hf --task rte --method finetune --lr 1e-3"),
])  # fmt: skip
def test_a_cell_as_typed_is_the_tables(number, line, typed):
    parser = argparse.ArgumentParser()
    run_command.add_arguments(parser)
    of = run_command.make_cell(parser.parse_args(typed.split()))
    setting = tables.Setting(dtype=usual_dtype())
    search = tables.searches(tables.TABLES[number], setting)[line, tasks.key(of.task)]
    assert of == search.cell(1e-3, 0)


def test_divergence_is_an_outcome(folder, tmp_path):
    outcome = finetune.run(cell(folder, Method("finetune", base="SGD"), lr=1e30), tmp_path)
    assert set(outcome) == {"diverged"}
    assert "loss is nan" in outcome["diverged"]


def test_a_run_without_development_samples_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "split", lambda *a: dataclasses.replace(split(*a), dev=()))
    with pytest.raises(ValueError, match="no development samples"):
        finetune.run(cell(folder), tmp_path)


def command(folder, out, *more):
    return main(["run", "--model", str(folder / "model"), "--data-dir", str(folder / "data"), "--out", str(out), *more])


def test_the_command(folder, tmp_path, capsys):
    sizes = ["--train", "8", "--dev", "4", "--test", "4", "--epochs", "2", "--max-length", "64"]
    arguments = [*["--task", "sst2", "--method", "cola", "--links", "2", "--ranks", "4", "2", "--lr", "1e-3"], *sizes]
    assert command(folder, tmp_path, *arguments) == 0
    shown = capsys.readouterr().out
    assert "model-SST-2-cola2-r4.2-lr0.001-seed0" in shown
    assert math.isfinite(json.loads(shown[shown.index("{") : shown.rindex("}") + 1])["test"])
    assert command(folder, tmp_path, *arguments) == 0  # found, not run
    assert capsys.readouterr().out == shown
    assert len(list(tmp_path.glob("cells/*"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task nli --method lora --lr 1e-3", "task='nli'"),
        ("--task sst2 --method lora", "give its peak learning rate"),
        ("--task sst2 --method lora --lr inf", "--lr: inf: give a number above 0"),
        ("--task sst2 --method lora --lr 1e-3 --links 2", "one link"),
        ("--task sst2 --method cola --links 9 --lr 1e-3", "links=9 in epochs=5"),
        ("--task sst2 --method lora --lr 1e-3 --train 0", "--train: 0: give a whole number of at least 1"),
        ("--task sst2 --method lora --lr 1e-3 --dtype float16", "needs a GPU"),
        ("--task rte --method lora --lr 1e-3", "has no folder for RTE"),
    ],
)
def test_arguments_that_cannot_be(folder, tmp_path, capsys, arguments, message):
    if "float16" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command(folder, tmp_path, *arguments.split()) == 2
    assert message in capsys.readouterr().err
