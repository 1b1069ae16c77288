"""A sweep runs every cell once, whatever kills it."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from experiments import hardware
from experiments.files import write_atomically
from experiments.sweep import OUTCOME, RateSearch, SweepError
from experiments.sweep.engines import run_apart
from tests.experiments.sweep import toy_sweep
from tests.experiments.sweep.toy_sweep import Toy, plan, searches, sweep

ROOT = Path(__file__).parents[3]


def lines(folder, kind):
    return [line.split()[1] for line in (folder / "log").read_text().splitlines() if line.startswith(kind)]


@pytest.mark.parametrize("workers", [1, 2, None])
def test_every_wanted_cell_is_run_once_and_found_again(tmp_path, workers):
    seen = []
    done = sweep(tmp_path).carry_out(
        plan(searches()), workers=workers, progress=False, finished=lambda cell, out: seen.append(cell)
    )
    # 0.1 → 0.2 → 0.4 → 0.8, which is worse; then the two other seeds at 0.4
    assert set(done) == {Toy(a, lr, 0) for a in "abc" for lr in toy_sweep.RATES} | {
        Toy(a, 0.4, s) for a in "abc" for s in (1, 2)
    }
    assert set(Counter(lines(tmp_path, "start")).values()) == {1}
    assert sorted(map(repr, seen)) == sorted(map(repr, done))
    again = sweep(tmp_path).carry_out(plan(searches()), workers=1, progress=False)
    assert again == done
    assert set(Counter(lines(tmp_path, "start")).values()) == {1}
    assert all((sweep(tmp_path).place(cell) / "kept").exists() for cell in done)


def test_a_killed_sweep_goes_on_and_repeats_nothing(tmp_path):
    undisturbed = sweep(tmp_path / "whole").carry_out(plan(searches(0.02)), workers=1, progress=False)
    folder, rng = tmp_path / "killed", random.Random(0)
    folder.mkdir()
    command = [sys.executable, "-m", "tests.experiments.sweep.toy_sweep", str(folder), "0.02", "1"]
    (folder / "log").touch()
    for _ in range(6):
        finished_before = {path.parent.name for path in folder.glob(f"cells/*/{OUTCOME}")}
        starts_before = Counter(lines(folder, "start"))
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        # wait for the sweep to have begun, so that the kill falls inside it on any machine
        while process.poll() is None and len(lines(folder, "start")) == sum(starts_before.values()):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        started = Counter(lines(folder, "start")) - starts_before
        assert not finished_before & set(started), "a finished cell was run again"
    done = sweep(folder).carry_out(plan(searches(0.02)), workers=1, progress=False)
    assert done == undisturbed


def test_workers_end_with_a_killed_sweep(tmp_path):
    """They would wait for ever: a worker holds both ends of the pipe that its cells come from."""
    command = [sys.executable, "-m", "tests.experiments.sweep.toy_sweep", str(tmp_path), "3600", "2"]
    process = subprocess.Popen(command, cwd=ROOT)
    (tmp_path / "log").touch()
    while process.poll() is None and len(lines(tmp_path, "start")) < 2:
        time.sleep(0.01)
    workers = [psutil.Process(int(line.split()[2])) for line in (tmp_path / "log").read_text().splitlines()]
    assert all(worker.is_running() for worker in workers)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs(workers, timeout=60)[1] == []


def test_a_second_sweep_in_the_folder_is_refused(tmp_path):
    command = [sys.executable, "-m", "tests.experiments.sweep.toy_sweep", str(tmp_path), "3600", "1"]
    (tmp_path / "log").touch()
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        while process.poll() is None and not lines(tmp_path, "start"):
            time.sleep(0.01)
        with pytest.raises(SweepError, match=r"another sweep runs in .*--out"):
            sweep(tmp_path).carry_out(plan(searches()), workers=1, progress=False)
    finally:
        process.kill()
        process.wait()
    assert len(sweep(tmp_path).carry_out(plan(searches()), workers=1, progress=False)) == 18


def test_a_process_that_dies_ends_the_sweep_and_keeps_what_is_finished(tmp_path):
    cells = [Toy("a", 0.1, 0), Toy("dies", 0.1, 0), Toy("b", 0.1, 0)]
    with pytest.raises(SweepError, match=r"a process died while running .*fewer --workers"):
        sweep(tmp_path).carry_out(lambda done: cells, workers=2, progress=False)
    assert sweep(tmp_path).read(Toy("dies", 0.1, 0)) is None


def test_an_error_of_the_runner_is_the_callers(tmp_path):
    for workers in (1, 2):
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            sweep(tmp_path).carry_out(lambda done: [Toy("fails", 0.1, 0)], workers=workers, progress=False)


def test_an_error_that_cannot_be_sent_is_told_in_words(tmp_path):
    place = tmp_path / "cells" / "odd"
    place.mkdir(parents=True)
    with pytest.raises(SweepError, match=r"^odd raised Odd: the hub refuses$"):
        run_apart(toy_sweep.run, Toy("odd", 0.1, 0), place)
    with pytest.raises(SweepError, match=r"^odd raised SystemExit: no such option$"):
        run_apart(toy_sweep.run, Toy("exits", 0.1, 0), place)
    with pytest.raises(ZeroDivisionError):
        run_apart(toy_sweep.run, Toy("fails", 0.1, 0), place)


def test_after_an_error_the_cells_that_run_are_kept(tmp_path):
    slow, fails = Toy("waits", 0.1, 0, 0.1), Toy("fails", 0.1, 0)
    with pytest.raises(ZeroDivisionError):
        sweep(tmp_path).carry_out(lambda done: [slow, fails], workers=2, progress=False)
    assert sweep(tmp_path).read(slow) is not None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cell": {}, "outcome": {}}'])
def test_a_file_that_is_no_outcome_is_named(tmp_path, text):
    cell = Toy("a", 0.1, 0)
    place = sweep(tmp_path).place(cell)
    place.mkdir(parents=True)
    (place / OUTCOME).write_text(text)
    with pytest.raises(SweepError, match=r"outcome\.json .*delete it, and the cell is run again"):
        sweep(tmp_path).carry_out(lambda done: [cell], workers=1, progress=False)


def test_an_outcome_says_what_made_it(tmp_path):
    cell = Toy("a", 0.1, 0)
    sweep(tmp_path).carry_out(lambda done: [cell], workers=1, progress=False)
    made = json.loads((sweep(tmp_path).place(cell) / OUTCOME).read_text())["made"]
    assert {"commit", "versions", "processor", "gpus", "seconds", "cpu_seconds"} == set(made)


def test_cells_that_differ_have_places_that_do(tmp_path):
    cells = [Toy(a, lr, s, n) for a in "ab" for lr in (0.1, 0.1000001) for s in (0, 1) for n in (0, 1)]
    places = {sweep(tmp_path).place(cell) for cell in cells}
    assert len(places) == 16
    assert all(place.name.isascii() and "/" not in place.name for place in places)
    assert ".." not in sweep(tmp_path).place(Toy("../../up", 0.1, 0)).relative_to(tmp_path).parts


def test_nothing_is_written_but_whole_files(tmp_path):
    write_atomically(tmp_path / "file", "one")
    write_atomically(tmp_path / "file", "two")
    assert (tmp_path / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_every_process_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "gpus", lambda: ["2", "5"])
    cells = [Toy("tells", 0.1, seed, 0.2) for seed in range(4)]
    done = sweep(tmp_path).carry_out(lambda done: cells, workers=2, threads=3, progress=False)
    assert {outcome["threads"] for outcome in done.values()} == {3}
    pairs = {(outcome["process"], outcome["gpu"]) for outcome in done.values()}
    assert {gpu for _, gpu in pairs} <= {"2", "5"}
    assert len({process for process, _ in pairs}) == len({gpu for _, gpu in pairs}) == len(pairs)


def test_gpus_are_named_as_the_caller_does(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-1,9")
    assert hardware.gpus() == ["3", "GPU-1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert hardware.gpus() == ["0", "1"]


def test_a_folder_that_cannot_be_made_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        sweep(tmp_path / "file").carry_out(plan(searches()), workers=1, progress=False)


def test_workers_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="workers=0"):
        sweep(tmp_path).carry_out(lambda done: [], workers=0)


# choosing a rate


def search(losses, rates=(1.0, 2.0, 4.0, 8.0), start=(), seeds=(0, 1)):
    """A search that is carried out at once, over a table of losses, and the order of what it asked for."""
    of = RateSearch(lambda lr, seed: (lr, seed), rates, (0,), seeds, lambda out: out["dev"], start)
    done, asked = {}, []
    while new := [cell for cell in of.wanted(done) if cell not in done]:
        asked.append(sorted(new))
        done.update({cell: {"dev": losses[cell[0]]} for cell in new})
    return of, done, asked


@pytest.mark.parametrize(
    ("losses", "start", "best", "tried"),
    [
        ((3, 2, 1, 2), (2.0,), 4.0, 4),
        ((1, 2, 3, 4), (4.0,), 1.0, 3),
        ((4, 3, 2, 1), (1.0,), 8.0, 4),
        ((2, 1, 3, 9), (2.0,), 2.0, 3),
        ((2, 1, 3, 9), (), 2.0, 4),
        ((1, 1, 1, 1), (2.0,), 1.0, 2),
        ((float("inf"), 3, 2, float("nan")), (), 4.0, 4),
    ],
)
def test_the_search_walks_to_an_inner_minimum(losses, start, best, tried):
    rates = (1.0, 2.0, 4.0, 8.0)
    of, done, _ = search(dict(zip(rates, losses)), start=start or rates)
    assert of.chosen(done) == best
    assert len({lr for lr, _ in done}) == tried
    assert of.results(done) == [(best, 0), (best, 1)]


def test_the_search_does_not_look_at_the_final_cells():
    of, done, _ = search({1.0: 1.0, 2.0: 2.0, 4.0: 3.0, 8.0: 4.0}, start=(1.0,))
    done[(1.0, 1)] = {"dev": 100.0}  # another seed's result, known only after the choice
    assert of.chosen(done) == 1.0


def test_a_single_rate_is_not_searched():
    of, _, asked = search({1.0: 5.0}, rates=(1.0,))
    assert asked == [[(1.0, 0), (1.0, 1)]]
    assert of.chosen({}) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": ()}, "rates="),
        ({"rates": (2.0, 1.0)}, "rates="),
        ({"start": (3.0,)}, "start="),
        ({"seeds": ()}, "seeds="),
        ({"search_seeds": ()}, "seeds="),
    ],
)
def test_searches_that_cannot_be(change, message):
    arguments = {"rates": (1.0, 2.0), "search_seeds": (0,), "seeds": (0,), "start": (1.0,)}
    with pytest.raises(ValueError, match=message):
        RateSearch(cell=lambda lr, seed: (lr, seed), loss=lambda out: 0.0, **{**arguments, **change})
