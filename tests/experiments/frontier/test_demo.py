"""The demo: from end to end on a small model, stopped and started again, and what its checks find."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import scipy.stats

from cola import Chain
from experiments.__main__ import main
from experiments.frontier import demo
from experiments.frontier.demo import CHAINED, Check, Finished, checks, in_words, sentence
from experiments.study.cells import StudyCell
from experiments.study.comparison import Results, rows
from experiments.sweep import Sweep


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--smoke", "--workers", "1", "--seeds", "2", "--out", str(folder)]) == 0
    return folder


def test_from_end_to_end(folder, capsys):
    written = json.loads((folder / "results.json").read_text())
    assert [row["arm"] for row in written["rows"]] == ["lora-4", "lora-12", CHAINED, "full"]
    assert (written["seeds"], written["steps"]) == ([0, 1], 20)
    assert all(check["holds"] for check in written["checks"])
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert len(Chain.load(folder / "chain")) == 15


def test_it_goes_on_where_it_was_stopped(folder, capsys):
    """A run that is missing is run again, and the others are not."""
    table = (folder / "table.txt").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/outcome.json")}
    (lost,) = folder.glob("cells/lora-r12*seed1-dev*/outcome.json")
    lost.unlink()
    assert main(["demo", "--smoke", "--workers", "1", "--seeds", "2", "--out", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "8 runs, 1 at a time, of which 7 are done" in shown
    assert "Progress counts 17 cells: these runs, their scores" in shown
    assert "The first run took" not in shown  # one run is left, so no others
    assert "with 7 runs from before" in shown
    changed = {path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {lost}
    without_seconds = [line.rsplit(None, 1)[0] for line in table.splitlines()]
    assert [line.rsplit(None, 1)[0] for line in (folder / "table.txt").read_text().splitlines()] == without_seconds


def test_the_first_seed_may_be_another(folder, tmp_path):
    """The runs of one seed are those of any comparison that has it."""
    command = ["demo", "--smoke", "--workers", "1", "--seed", "1", "--seeds", "1"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    first, second = (json.loads((out / "results.json").read_text()) for out in (folder, tmp_path / "out"))
    assert (second["seeds"], second["command"]) == ([1], "python -m experiments demo --seed 1 --seeds 1 --smoke")
    assert [row["tests"] for row in second["rows"]] == [row["tests"][1:] for row in first["rows"]]


def test_wrong_arguments_are_refused(tmp_path, capsys):
    assert main(["demo", "--smoke", "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert "argument --seeds: 0: give a whole number of at least 1" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert (
        f"demo: --out {tmp_path / 'file'} cannot be written: {tmp_path / 'file'} is a file" in capsys.readouterr().err
    )


def test_a_check_that_fails_is_the_exit_status(folder, capsys, monkeypatch):
    monkeypatch.setattr(demo, "checks", lambda *args, **kwargs: [Check("it is as it should be", False, "it is not")])
    assert main(["demo", "--smoke", "--workers", "1", "--seeds", "2", "--out", str(folder)]) == 1
    assert "FAIL it is as it should be (it is not)" in capsys.readouterr().out


@pytest.fixture
def results(folder):
    """Results whose losses are made up: the chain closes a quarter of the gap."""
    plan = demo.make_plan(folder, (0, 1), smoke=True)
    sweep = Sweep(folder, demo.run, demo.name)
    done = {cell: sweep.read(cell) for cell in plan.wanted({}) + [run.tested for run in plan.wanted({})]}
    done[plan.untouched] = {"test": 9.0}
    losses = {"lora-4": (2.0, 2.01), "lora-12": (1.7, 1.74), CHAINED: (1.9, 1.911), "full": (1.6, 1.63)}
    for arm, values in losses.items():
        for seed, loss in zip(plan.seeds, values):
            cell = StudyCell(plan.setting, plan.arms[arm].method, plan.arms[arm].start, seed).tested
            done[cell] = {**done[cell], "test": loss}
    return Results(plan, done)


def changed(results, **changes):
    """The results, with other values in the outcomes that have them."""
    return Results(
        results.plan,
        {cell: {key: changes.get(key, lambda c, v: v)(cell, value) for key, value in out.items()}
         for cell, out in results.done.items()},
    )  # fmt: skip


def test_the_sentence_says_what_was_shown(results):
    found = {row.arm: row.tests for row in rows(results)}
    p = scipy.stats.ttest_rel(found[CHAINED], found["lora-4"]).pvalue
    said = sentence(rows(results), 1.0)
    assert said.startswith("Here the gap to full fine-tuning is 0.390, of which three times the rank closes 73%: rank")
    assert "the chain's loss is 0.0995 bits per byte lower (so with 2 of 2 seeds, p = " in said
    assert f"p = {p:.2g} in a paired t test), 26% of the gap" in said
    worse = changed(results, test=lambda cell, loss: loss + (cell.method.kind == "cola"))
    assert "0.9005 bits per byte higher" in sentence(rows(worse), 1.0)
    alone = Results(dataclasses.replace(results.plan, seeds=(0,)), results.done)
    assert "(so with 1 of 1 seeds)" in sentence(rows(alone), 1.0)


def test_checks_fail_when_there_is_nothing_to_learn_from_the_results(results):
    def failed(results):
        return [check.what for check in checks(results, rows(results)) if not check.holds]

    assert failed(results) == []
    better = changed(results, test=lambda cell, loss: loss if cell.lr else 1.5)
    assert failed(better) == ["every arm beats the untouched model"]
    flat = changed(results, test=lambda cell, loss: 2 + loss / 100 if cell.lr else loss)
    assert failed(flat) == ["rank binds"]
    wrong = changed(results, rebuilt=lambda cell, _: 0.1 if cell.seed == 1 else 0.0)
    assert failed(wrong) == ["saved chains rebuild the tuned weights"]
    short = changed(results, losses=lambda cell, losses: losses[:1] if cell.seed == 1 else losses)
    assert failed(short) == ["every run took the same steps"]
    infinite = changed(results, losses=lambda cell, losses: [float("nan"), *losses[1:]])
    assert failed(infinite) == ["every loss is finite"]


@pytest.mark.long
def test_a_demo_that_is_killed_goes_on(folder, tmp_path):
    """kill -9 in mid-run, of the whole group: what was done is kept, and the results are those of an unbroken run."""
    options = ["demo", "--smoke", "--workers", "1", "--seeds", "2", "--out", str(tmp_path)]
    with subprocess.Popen([sys.executable, "-m", "experiments", *options], start_new_session=True) as process:
        while process.poll() is None and not list(tmp_path.glob("cells/*/outcome.json")):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/outcome.json")}
    assert 0 < len(done) < 17  # eight runs, their tests, and the untouched model's
    assert main(options) == 0
    assert done.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/outcome.json")}.items()
    cut, whole = (json.loads((place / "results.json").read_text()) for place in (tmp_path, folder))
    assert [row["tests"] for row in cut["rows"]] == [row["tests"] for row in whole["rows"]]


def test_after_the_first_run_it_says_how_long_the_others_take(capsys, monkeypatch):
    """Only then: nothing is promised before, because machines differ."""
    clock = iter([0.0, 40.0])
    monkeypatch.setattr(demo, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    finished = Finished(runs=9, kept=3, workers=2)
    for _ in range(3):
        finished(None, {})
    assert not capsys.readouterr().out
    for _ in range(9):
        finished(None, {})
    assert (
        capsys.readouterr().out == "The first run took 40 seconds on this machine; the others need about 3 minutes.\n"
    )


@pytest.mark.parametrize(
    "seconds, words", [(0.4, "0 seconds"), (1, "1 second"), (89, "89 seconds"), (90, "2 minutes"), (5400, "2 hours")]
)
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words
