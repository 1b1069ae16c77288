"""Several things in one directory: savers at once, a chain beside a checkpoint, readers of a run that saves."""

import copy
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from cola import Chain, ChainOptimizer, LinkConfig, StepKnots, StoreError
from cola.chain import files, on_disk
from tests.models import BODY, Net, train

ROOT = Path(__file__).parents[3]


def new(seed=0, **link):
    model = Net()
    config = LinkConfig(**{"r": 1, "target_modules": BODY, **link})
    return model, ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=config, lr=0.02, seed=seed)


def links(chain):
    return [on_disk.link_to_bytes(link) for link in chain]


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


# savers at the same time


@pytest.fixture
def holder(tmp_path):
    """Another process that saves to ``tmp_path / "run"`` until it is told to stop."""
    code = (
        "import sys, pathlib; sys.path.insert(0, 'cola/chain'); import files\n"  # alone, without torch
        "with files.locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert started.stdout.readline() == "held\n"
    yield started
    started.kill()
    started.wait()
    started.stdin.close(), started.stdout.close()


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_who_saves_while_another_process_does_is_told_which(end, holder, tmp_path):
    model, opt = new()
    train(opt, model, 3)
    opt.save(tmp_path / "elsewhere")
    before = contents(tmp_path / "run")
    for save in (opt.save, opt.chain.save):
        with pytest.raises(BlockingIOError, match=f"process {holder.pid} on .* is saving there now") as raised:
            save(tmp_path / "run")
        assert str(tmp_path / "run") in str(raised.value)
    assert contents(tmp_path / "run") == before
    if end == "kill":  # a lock does not outlive its holder
        holder.send_signal(signal.SIGKILL)
    else:
        holder.stdin.close()
    holder.wait()
    opt.save(tmp_path / "run")
    assert links(Chain.load(tmp_path / "run")) == links(opt.chain)
    assert not (tmp_path / "run" / files.LOCK).exists()
    train(opt, model, 1, start=3)


def test_savers_by_turns_and_at_once_leave_a_whole_chain(tmp_path):
    """Many threads, each with a descriptor of its own: every save is whole, or refused."""
    chains = []
    for steps in (3, 5, 7):
        model, opt = new()
        train(opt, model, steps)
        chains.append(opt.chain)
    saved, refused = [], []

    def run(chain):
        for _ in range(15):
            try:
                chain.save(tmp_path)
                saved.append(chain)
            except BlockingIOError:
                refused.append(chain)

    threads = [threading.Thread(target=run, args=(chain,)) for chain in chains]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert saved
    assert len(saved) + len(refused) == 45
    assert links(Chain.load(tmp_path)) in [links(chain) for chain in chains]
    assert not (tmp_path / files.LOCK).exists()
    longest = max(chains, key=len)
    longest.save(tmp_path)
    assert links(Chain.load(tmp_path)) == links(longest)


def test_a_lock_file_that_was_left_over_locks_nothing(tmp_path):
    (tmp_path / files.LOCK).write_text("process 1 on moon")
    model, opt = new()
    train(opt, model, 3)
    opt.save(tmp_path)
    assert not (tmp_path / files.LOCK).exists()
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / files.LOCK).symlink_to(outside)
    with pytest.raises(OSError, match="what was saved before is intact"):
        opt.save(tmp_path)
    assert outside.read_text() == "mine"


def test_on_a_file_system_without_locks_saving_works_as_ever(tmp_path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
    model, opt = new()
    train(opt, model, 3)
    opt.save(tmp_path)
    assert links(Chain.load(tmp_path)) == links(opt.chain)
    assert not (tmp_path / files.LOCK).exists()


# a chain and a checkpoint


def test_the_one_that_was_saved_last_is_loaded(tmp_path):
    model, opt = new()
    train(opt, model, 4)
    opt.chain.save(tmp_path)
    train(opt, model, 6, start=4)
    opt.save(tmp_path)
    assert len(Chain.load(tmp_path)) == len(opt.chain) == 5
    train(opt, model, 3, start=10)
    opt.chain.save(tmp_path)
    assert len(Chain.load(tmp_path)) == 6


@pytest.mark.parametrize("first", ["chain", "checkpoint"])
@pytest.mark.parametrize("upto", [0, 1, 2])
def test_a_link_that_was_undone_does_not_come_back(first, upto, tmp_path):
    model, opt = new()
    train(opt, model, 6)
    save = {"chain": lambda: opt.chain.save(tmp_path), "checkpoint": lambda: opt.save(tmp_path)}
    save.pop(first)()
    while len(opt.chain) > upto:
        opt.undo(Net())
    save.popitem()[1]()
    assert links(Chain.load(tmp_path)) == links(opt.chain)
    assert len(Chain.load(tmp_path)) == upto


def test_a_link_that_took_another_ones_place_is_loaded(tmp_path):
    model, opt = new()
    train(opt, model, 4)
    opt.chain.save(tmp_path)
    opt.undo(Net())
    train(opt, model, 2, start=20)
    assert len(opt.chain) == 2
    opt.save(tmp_path)
    assert links(Chain.load(tmp_path)) == links(opt.chain)


def test_a_clock_that_was_turned_back_changes_nothing(tmp_path, monkeypatch):
    model, opt = new()
    train(opt, model, 4)
    for hours, save in ((9, opt.chain.save), (3, opt.save), (1, opt.chain.save), (0, opt.save)):
        monkeypatch.setattr(on_disk.time, "time_ns", lambda hours=hours: hours * 3600 * 10**9)
        if len(opt.chain) > 1:
            opt.undo(Net())
        else:
            train(opt, model, 4, start=4)
        save(tmp_path)
        assert links(Chain.load(tmp_path)) == links(opt.chain)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_save_that_fails_leaves_what_was_loaded_before(call, nth, tmp_path, monkeypatch):
    """Until the new manifest is in its place, the old ones count as they did."""
    model, opt = new()
    train(opt, model, 6)
    opt.save(tmp_path)
    opt.undo(Net())
    opt.chain.save(tmp_path)
    kept = links(opt.chain)
    train(opt, model, 2, start=6)
    count, original = 0, getattr(os, call)

    def failing(*args):
        nonlocal count
        count += 1
        if count == nth:
            raise OSError(5, os.strerror(5))
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        try:
            opt.save(tmp_path)
        except OSError:
            assert links(Chain.load(tmp_path)) in (kept, links(opt.chain))
            if call == "replace":
                assert links(Chain.load(tmp_path)) == kept
    opt.save(tmp_path)
    assert links(Chain.load(tmp_path)) == links(opt.chain)


def test_chains_of_two_runs_are_not_confused(tmp_path):
    model, opt = new()
    train(opt, model, 4)
    opt.chain.save(tmp_path)
    model, other = new(seed=1)
    train(other, model, 4)
    other.save(tmp_path)
    with pytest.raises(StoreError, match="hold different chains: move one of them"):
        Chain.load(tmp_path)
    (tmp_path / "chain.json").unlink()
    assert links(Chain.load(tmp_path)) == links(other.chain)


# readers of a run that saves


@pytest.mark.parametrize("reader", ["chain", "checkpoint"])
def test_what_is_replaced_while_it_is_read_is_read_again(reader, tmp_path, monkeypatch):
    model, opt = new()
    train(opt, model, 3)
    opt.save(tmp_path)
    expected, original, read = copy.deepcopy(opt), on_disk.read_checked, []

    def slow(path, *about):
        read.append(path)
        if len(read) == 1:
            train(opt, model, 2, start=3)
            opt.undo(Net()), opt.undo(Net())  # so that all files of the first save go
            opt.save(tmp_path)
        return original(path, *about)

    monkeypatch.setattr(on_disk, "read_checked", slow)
    if reader == "chain":
        assert links(Chain.load(tmp_path)) == links(opt.chain)
    else:
        _, resumed = new()
        resumed.load(tmp_path)
        assert links(resumed.chain) == links(opt.chain)
        assert resumed.steps == opt.steps != expected.steps


def test_what_is_missing_for_good_is_not_waited_for(tmp_path, monkeypatch):
    model, opt = new()
    train(opt, model, 3)
    opt.save(tmp_path)
    next(tmp_path.glob("link-*")).unlink()
    reads, original = [], on_disk.read_checked
    monkeypatch.setattr(on_disk, "read_checked", lambda path, *about: reads.append(path) or original(path, *about))
    with pytest.raises(StoreError, match="is missing"):
        Chain.load(tmp_path)
    assert len(reads) == 1
