"""The offline study: splits that do not overlap, rates chosen before the test, a run that repeats."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_model

from experiments.__main__ import main
from experiments.methods import Method
from experiments.study import arms, cells, text
from experiments.study.cells import StudyCell
from experiments.study.comparison import inside
from experiments.study.setting import Setting
from experiments.sweep import Sweep
from experiments.tiny import tiny_opt
from experiments.tiny.loss import held_out_loss
from tests.experiments import small

SMALL = Setting(epochs=2, train=4, held_out=2, context=16, batch_size=2)
TIMES = ("seconds", "cpu_seconds")


@given(st.lists(st.text(alphabet="ab ", min_size=1, max_size=900), min_size=1, max_size=60))
def test_splits_part_the_paragraphs(paragraphs):
    whole = "\n\n".join(paragraphs)
    parts = text.interleaved(whole)
    kept = [p for split in ("train", "dev", "test") if parts[split] for p in parts[split].split("\n\n")]
    assert sorted(kept + [""] * whole.count("\n\n\n\n"))[-1:] == sorted(whole.split("\n\n"))[-1:]
    assert sum(map(len, kept)) == sum(map(len, whole.split("\n\n")))


def test_held_out_passages_are_spread_over_the_text():
    whole = "\n\n".join(f"<{i}>" + "x" * 2000 for i in range(100))
    parts = text.interleaved(whole)
    assert [p[: p.index(">") + 1] for p in parts["dev"].split("\n\n")] == [f"<{i}>" for i in range(8, 100, 10)]
    assert [p[: p.index(">") + 1] for p in parts["test"].split("\n\n")] == [f"<{i}>" for i in range(9, 100, 10)]


@given(st.integers(1, 50), st.integers(1, 60))
def test_kept_rows_are_distinct_and_spread(rows, count):
    kept = text.spread(torch.arange(rows), count).tolist()
    assert len(set(kept)) == len(kept) == min(rows, count)
    assert kept == sorted(kept)
    assert kept[0] == 0


def test_a_file_is_cut_by_its_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["[UNK]", *(f"w{i}" for i in range(50))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    corpus = tmp_path / "text.txt"
    corpus.write_text("\n\n".join(" ".join(f"w{(i + j) % 50}" for j in range(700)) for i in range(20)))
    found = text.blocks(str(corpus), str(tmp_path / "model"), 10, 30, 5)
    assert found.train.shape == (30, 10)
    assert found.dev.shape == found.test.shape == (5, 10)
    assert found.train[0].tolist() == [words[f"w{j}"] for j in range(10)]
    with pytest.raises(ValueError, match="less than a block of 100000"):
        text.blocks(str(corpus), str(tmp_path / "model"), 100000, 30, 5)
    with pytest.raises(FileNotFoundError):
        text.blocks(str(tmp_path / "none.txt"), str(tmp_path / "model"), 10, 30, 5)


def run(cell, folder):
    sweep = Sweep(folder, cells.run, cells.name)
    return sweep.carry_out(lambda done: [cell], workers=1, progress=False)[cell]


@pytest.mark.parametrize("method", [Method.lora(), Method.cola(2), Method("finetune"), Method.cola(2, ranks=(8, 4))])
def test_a_run_repeats_to_the_bit_and_leaves_the_weights_it_reports(tmp_path, method):
    cell = StudyCell(SMALL, method, 4e-3, 1)
    one, two = run(cell, tmp_path / "one"), run(cell, tmp_path / "two")
    assert {k: v for k, v in one.items() if k not in TIMES} == {k: v for k, v in two.items() if k not in TIMES}
    assert len(one["losses"]) == 4
    assert len(one["dev_by_epoch"]) == 2
    assert [knot["step"] for knot in inside(one)] == ([2] if method.kind == "cola" else [])
    tested = run(cell.tested, tmp_path / "one")
    model = SMALL.load()
    load_model(model, str(Sweep(tmp_path / "one", cells.run, cells.name).place(cell) / "weights.safetensors"))
    assert tested == {"test": held_out_loss(model, SMALL.blocks().test)}
    assert one["dev"] == held_out_loss(model, SMALL.blocks().dev)


def test_the_loss_is_the_mean_over_predicted_tokens():
    """Against the definition in float64; the model's own loss rounds the logits to fp32 before it."""
    model, ids = tiny_opt.load().double(), SMALL.blocks().dev
    logits = model(input_ids=ids).logits
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    # a logit's rounding is half a unit in the last place, and moves a log-probability by twice that at most; then sums
    bound = 4 * torch.finfo(torch.float32).eps * logits.abs().max().item()
    assert abs(held_out_loss(model, ids, batch=1) - nats) < bound


def test_the_same_order_for_all_arms_of_a_seed(monkeypatch, tmp_path):
    """Pairs are pairs: two methods see the same blocks at the same step."""
    seen = []
    for method in (Method.lora(), Method("finetune")):
        model = tiny_opt.load()
        ids = []
        model.register_forward_pre_hook(
            lambda module, args, kwargs, ids=ids: ids.append(kwargs["input_ids"]) if module.training else None,
            with_kwargs=True,
        )
        cells.fine_tune(model, StudyCell(SMALL, method, 1e-3, 3))
        seen.append(torch.cat(ids))
    assert torch.equal(*seen)


def test_divergence_is_an_outcome_not_a_crash(tmp_path):
    cell = StudyCell(dataclasses.replace(SMALL, train=8), Method("finetune", base="SGD"), 1e30, 0)
    assert "diverged" in run(cell, tmp_path)


def test_a_chosen_run_that_diverged_fails_the_command_and_is_named(tmp_path, capsys):
    arguments = ["study", "--smoke", "--out", str(tmp_path), "--workers", "1", "--arms", "lora"]
    assert main(arguments) == 0
    capsys.readouterr()
    (path,) = tmp_path.glob("cells/*seed1-dev*/outcome.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "outcome": {"diverged": "the loss is nan"}}))
    (path.parent / "weights.safetensors").unlink()
    (tested,) = tmp_path.glob("cells/*seed1-test*/outcome.json")
    tested.unlink()
    assert main(arguments) == 1
    assert "diverged: lora" in capsys.readouterr().err


def test_the_command_and_its_resumption(tmp_path, capsys):
    arguments = ["study", "--smoke", "--out", str(tmp_path), "--workers", "1"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "| LoRA |" in shown
    assert "COLA, 2 links" in shown
    written = json.loads((tmp_path / "study-qv.json").read_text())
    assert written["command"] == "python -m experiments study --smoke"
    assert (written["seeds"], written["search_seeds"], written["unit"]) == ([0, 1], [0], "bits per byte")
    lora, chain = written["rows"]
    assert (lora["arm"], chain["arm"]) == ("lora", "cola-2")
    mean = math.fsum(a - b for a, b in zip(chain["tests"], lora["tests"])) / 2
    assert chain["against"]["difference"]["mean"] == pytest.approx(mean, rel=1e-12)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/*.*")}
    assert main(arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/*.*")}
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: 0"),
        (["--seeds", "0"], "argument --seeds: 0"),
        (["--search-seeds", "0"], "argument --search-seeds: 0"),
        (["--memory", "2", "--cpus", "1"], "--cpus and --memory: that is a run's share"),
        (["--cluster", "127.0.0.1:1"], "--cluster 127.0.0.1:1: nobody answers there"),
        (["--corpus", "no-such-file", "--model", "no-such-folder"], "no-such"),
        (["--smoke", "--workers", "1", "--out", "/dev/null/folder"], "/dev/null"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, capsys, arguments, message):
    assert main(["study", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_arm_that_the_model_cannot_carry_is_refused_before_anything_is_run(tmp_path, capsys):
    """Grouped queries: the value projections are 16x32, as those of the small Llama are 32x64."""
    small.model("llama", torch.float32).save_pretrained(tmp_path / "model")
    small.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join("It was great. " * 150 for _ in range(20)))
    given = ["--model", str(tmp_path / "model"), "--corpus", str(tmp_path / "text.txt"), "--smoke", "--workers", "1"]
    command = ["study", "--out", str(tmp_path / "out"), *given]
    capsys.readouterr()
    assert main([*command, "--arms", "lora", "lora-24", "cola-5", "cola-3-16", "lora-32"]) == 2
    shown = capsys.readouterr()
    for arm in ("lora-24 (LoRA, rank 24 = 3·8): r=24", "lora-32 (LoRA, rank 32): r=32"):
        assert (
            f"arm {arm} is above the rank of layer 'model.layers.0.self_attn.v_proj', whose weight is 16x32: "
            "choose r of at most 16\n"
        ) in shown.err
    assert "arm cola-5 (COLA, 5 links): links=5 in epochs=2" in shown.err
    assert "arm cola-3-16 (COLA, 3 links, rank 16): links=3 in epochs=2" in shown.err
    assert shown.err.endswith("leave out these arms: --arms lora\n")
    assert not shown.out
    assert not (tmp_path / "out").exists()
    assert main([*command, "--arms", "lora-24"]) == 2
    assert capsys.readouterr().err.endswith("choose other --arms\n")
    assert main([*command, "--arms", "lora"]) == 0


def test_chains_are_compared_with_their_own_kind():
    for arm in arms.STUDY.values():
        one, other = arm.method, arms.STUDY[arm.reference].method
        if arm.reference == arms.REFERENCE:
            continue
        assert (one.kind, other.kind) == ("cola", "lora")
        assert (one.base, one.ranks, one.alpha) == (other.base, other.ranks, other.alpha)


def test_the_untouched_model_is_not_changed_by_a_run(tmp_path):
    before = {name: p.clone() for name, p in tiny_opt.load().named_parameters()}
    run(StudyCell(SMALL, Method.lora(), 1e-3, 0), tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in tiny_opt.load().named_parameters())
