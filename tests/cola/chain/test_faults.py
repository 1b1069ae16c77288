"""Processes are killed, disks fill up, directories turn read-only: the last good state stays, and the run goes on."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cola import Chain, ChainOptimizer, LinkConfig, StepKnots
from tests.models import BODY, Net, train

ROOT = Path(__file__).parents[3]


def killed(kills, seed):
    done = subprocess.run(
        [sys.executable, "-m", "tests.cola.chain.killed_runs", str(kills), str(seed)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_ends_where_the_undisturbed_one_does():
    result = killed(20, seed=1)
    assert result["kills"] >= 20
    assert result["ends"] > 0
    assert not result["wrong"]


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_two_hundred_times_ends_where_the_undisturbed_one_does():
    result = killed(200, seed=2)
    assert result["kills"] >= 200
    assert not result["wrong"]
    # knots and every stage of writing a checkpoint were among the moments
    for moment in ("before tie", "after tie", "before fsync", "after fsync", "before rename", "after rename"):
        assert result["where"].get(moment, 0) > 0, result["where"]


def new():
    model = Net()
    link = LinkConfig(r=2, target_modules=BODY)
    return model, ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=link, lr=0.02)


def goes_on(model, opt, directory, steps):
    """The interrupted run goes on to where an undisturbed one is, and can save again."""
    train(opt, model, 3, start=steps)
    opt.save(directory)
    twin, other = new()
    train(other, twin, steps + 3)
    resumed, again = new()
    again.load(directory)
    for one in (model, resumed):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), twin.state_dict().values()))


@contextlib.contextmanager
def mounted(directory, options):
    """A file system of its own at ``directory``; skips where that takes rights that the process lacks."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("write", ["save", "chain"])
def test_a_full_disk_is_an_error_that_the_run_survives(write, tmp_path):
    disk = tmp_path / "disk"
    with mounted(disk, "size=48k"):
        model, opt = new()
        steps, failed = 0, None
        while failed is None:
            before = contents(disk)
            train(opt, model, 1, start=steps)
            steps += 1
            try:
                opt.save(disk) if write == "save" else opt.chain.save(disk)
            except OSError as error:
                failed = error
            assert steps < 100, "the disk did not fill up"
        assert failed.errno == errno.ENOSPC
        assert "No space left on device; what was saved before is intact" in str(failed)
        after = contents(disk)
        assert not [name for name in after if name.endswith(".tmp")]
        assert before.items() <= after.items()
        assert len(Chain.load(disk)) > 0
        if write == "save":
            new()[1].load(disk)
        goes_on(model, opt, tmp_path / "elsewhere", steps)


def test_a_read_only_directory_is_an_error_that_the_run_survives(tmp_path):
    disk = tmp_path / "disk"
    with mounted(disk, "size=1m"):
        model, opt = new()
        train(opt, model, 3)
        opt.save(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        before = contents(disk)
        train(opt, model, 2, start=3)
        with pytest.raises(OSError, match=r"Read-only file system; what was saved before is intact") as raised:
            opt.save(disk)
        assert raised.value.errno == errno.EROFS
        assert contents(disk) == before
        new()[1].load(disk)
        goes_on(model, opt, tmp_path / "elsewhere", 5)


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_write_that_stops_halfway_leaves_the_last_checkpoint(tmp_path):
    """The limit on a file's size lets the first bytes through and then fails, as a full disk does."""
    import resource

    model, opt = new()
    train(opt, model, 3)
    opt.save(tmp_path / "run")
    before = contents(tmp_path / "run")
    train(opt, model, 2, start=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="what was saved before is intact") as raised:
            opt.save(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG
    assert contents(tmp_path / "run") == before
    goes_on(model, opt, tmp_path / "run", 5)


CALLS = ["open", "fsync", "replace", "mkdir"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
def test_any_failing_call_leaves_the_last_checkpoint(call, nth, tmp_path, monkeypatch):
    """The n-th call of one kind fails, wherever in the save that is; then a save that succeeds."""
    model, opt = new()
    train(opt, model, 3)
    opt.save(tmp_path / "run")
    expected = {n: v.clone() for n, v in model.state_dict().items()}
    steps = 3
    train(opt, model, 2, start=steps)
    count = 0
    original = getattr(os, call)

    def failing(*args, **kwargs):
        nonlocal count
        count += 1
        if count == nth:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        try:
            opt.save(tmp_path / "run")
            failed = None
        except (OSError, ValueError) as error:
            failed = error
    assert failed is None or "Input/output error" in str(failed)
    resumed, again = new()
    again.load(tmp_path / "run")
    if failed and again.steps == 3:
        assert all(torch.equal(a, expected[n]) for n, a in resumed.state_dict().items())
    else:
        assert again.steps == 5  # the new one was complete before the failure
    goes_on(model, opt, tmp_path / "run", 5)
