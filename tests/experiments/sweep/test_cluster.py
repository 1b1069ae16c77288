"""Sweeps on a Ray cluster of this machine: two nodes of one core each, and a head that runs no cells."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter

import psutil
import pytest

from experiments.__main__ import main
from experiments.command_line import add_whereabouts
from experiments.sweep import OUTCOME, Cluster, SweepError, cluster, requested
from tests.experiments.sweep.test_sweep import ROOT, lines
from tests.experiments.sweep.toy_sweep import Toy, plan, searches, sweep

long = pytest.mark.long


@pytest.fixture(scope="module")
def started():
    ray_cluster = pytest.importorskip("ray.cluster_utils")
    # a short path, because it holds sockets
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        head = {"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False, "temp_dir": folder}
        one = ray_cluster.Cluster(initialize_head=True, head_node_args=head)
        yield one
        one.shutdown()


@pytest.fixture
def nodes(started):
    """The cluster, with both nodes; the second one has a GPU."""
    for gpus in range(len(started.worker_nodes), 2):
        started.add_node(num_cpus=1, num_gpus=gpus)
    return started


@long
def test_a_node_is_killed_and_every_outcome_is_there_once(nodes, tmp_path):
    cells = [Toy("hangs", 0.1, 0), *(Toy("a", 0.1, seed) for seed in range(5)), Toy("tells", 0.1, 0)]
    undisturbed = sweep(tmp_path / "here").carry_out(lambda done: cells[1:-1], workers=1, progress=False)
    finished, lost = [], []

    def kill(cell, outcome):
        finished.append(cell)
        if not lost:  # while the first cell hangs on one node, another one has been run on the other
            hung = sweep(tmp_path).place(cells[0]) / "hung"
            while not hung.exists():
                time.sleep(0.01)
            raylet = psutil.Process(int(hung.read_text())).ppid()
            lost.extend(n for n in nodes.worker_nodes if n.all_processes["raylet"][0].process.pid == raylet)
            nodes.remove_node(lost[0], allow_graceful=False)

    where = Cluster(nodes.address, gpus=0)
    done = sweep(tmp_path).carry_out(lambda done: cells, cluster=where, progress=False, finished=kill)
    assert len(lost) == 1
    assert list(done) == cells
    assert Counter(finished) == Counter(cells)
    assert {cell: done[cell] for cell in cells[1:-1]} == undisturbed
    assert done[cells[-1]]["gpu"] == ""
    names = [sweep(tmp_path).place(cell).name for cell in cells]
    # the cell whose node was lost is begun twice; no other one is
    assert Counter(lines(tmp_path, "start")) == {name: 1 + (name == names[0]) for name in names}
    assert Counter(lines(tmp_path, "end")) == dict.fromkeys(names[:-1], 1)
    assert {path.parent.name for path in tmp_path.glob(f"cells/*/{OUTCOME}")} == set(names)


@long
def test_nodes_without_the_folder_send_and_get_files(nodes, tmp_path):
    cells = [Toy("a", 0.1, 0), Toy("reads", 0.1, 0), Toy("tells", 0.1, 0)]

    def plan(done):
        (tmp_path / ".cluster").unlink(missing_ok=True)  # so no node knows the folder for the sweep's
        return cells[: 1 + len(done)]

    done = sweep(tmp_path).carry_out(plan, cluster=Cluster(nodes.address, memory=0.1), progress=False)
    told = done[cells[2]]
    assert (told["gpu"], told["threads"]) == ("0", 1)
    assert told["process"] != os.getpid()
    assert done[cells[1]] == {"read": "a"}
    assert (sweep(tmp_path).place(cells[0]) / "kept").read_text() == "a"
    assert not (tmp_path / "log").exists()
    made = json.loads((sweep(tmp_path).place(cells[0]) / OUTCOME).read_text())["made"]
    here = sweep(tmp_path / "here")
    here.carry_out(lambda done: cells[:1], workers=1, progress=False)
    theirs = json.loads((here.place(cells[0]) / OUTCOME).read_text())["made"]
    assert {**made, "seconds": 0, "cpu_seconds": 0} == {**theirs, "seconds": 0, "cpu_seconds": 0}


@long
def test_a_killed_sweep_ends_its_tasks_and_goes_on(nodes, tmp_path):
    undisturbed = sweep(tmp_path / "here").carry_out(plan(searches(0.1)), workers=1, progress=False)
    command = [sys.executable, "-m", "tests.experiments.sweep.toy_sweep", str(tmp_path), "0.1", "2", nodes.address]
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None and not list(tmp_path.glob(f"cells/*/{OUTCOME}")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    workers = {int(line.split()[2]) for line in (tmp_path / "log").read_text().splitlines()}
    assert psutil.wait_procs([psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)], timeout=60)[1] == []
    kept = {path.parent.name for path in tmp_path.glob(f"cells/*/{OUTCOME}")}
    before = Counter(lines(tmp_path, "start"))
    assert sweep(tmp_path).carry_out(plan(searches(0.1)), workers=1, progress=False) == undisturbed
    assert not kept & set(Counter(lines(tmp_path, "start")) - before), "a finished cell was run again"


@long
def test_what_goes_wrong_on_a_cluster(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "RETRIES", 0)  # a process takes seconds to start
    where = Cluster(nodes.address, gpus=0)
    with pytest.raises(ZeroDivisionError, match=r"^on purpose$"):
        sweep(tmp_path).carry_out(lambda done: [Toy("fails", 0.1, 0)], cluster=where, progress=False)
    with pytest.raises(SweepError, match=r"odd-0\.1-0-\w+ raised Odd: the hub refuses"):
        sweep(tmp_path).carry_out(lambda done: [Toy("odd", 0.1, 0)], cluster=where, progress=False)
    few = r"no node .* has 64 CPUs, 0 GPUs, and .* its nodes have .*1 CPU, 1 GPU, .*--cpus"
    with pytest.raises(SweepError, match=few):
        sweep(tmp_path).carry_out(lambda done: [], cluster=Cluster(nodes.address, cpus=64, gpus=0), progress=False)
    with pytest.raises(SweepError, match=r"dies-0.1-0 was begun 1 times, .*lost each time.*--memory"):
        sweep(tmp_path).carry_out(lambda done: [Toy("dies", 0.1, 0)], cluster=where, progress=False)


@long
def test_a_study_on_a_cluster_has_the_outcomes_of_one_process(nodes, tmp_path, capsys):
    command = ["study", "--smoke", "--arms", "lora", "--seeds", "1"]
    assert main([*command, "--out", str(tmp_path / "here"), "--workers", "1"]) == 0
    assert main([*command, "--out", str(tmp_path / "there"), "--cluster", nodes.address, "--gpus", "0"]) == 0

    def outcomes(folder):
        read = {path.parent.name: json.loads(path.read_text())["outcome"] for path in folder.glob(f"cells/*/{OUTCOME}")}
        return {name: {k: v for k, v in out.items() if "seconds" not in k} for name, out in read.items()}

    assert outcomes(tmp_path / "there") == outcomes(tmp_path / "here")
    assert len(outcomes(tmp_path / "there")) == 2


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "nobody answers there"),
        ("127.0.0.1:70000", "nobody answers there"),
        ("local", "give auto or HOST:PORT"),
        ("head:", "give auto or HOST:PORT"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(tmp_path, address, message):
    with pytest.raises(ConnectionError, match=message):
        sweep(tmp_path).carry_out(plan(searches()), cluster=Cluster(address), progress=False)


def typed(line):
    parser = argparse.ArgumentParser()
    add_whereabouts(parser)
    return requested(parser.parse_args(line.split()))


def test_options_say_where(monkeypatch):
    pytest.importorskip("ray")
    assert typed("--workers 2") is None
    assert typed("--cluster auto") == Cluster("auto")
    assert typed("--cluster a:1 --cpus 4 --gpus 0.5 --memory 12") == Cluster("a:1", 4, 0.5, 12.0)
    with pytest.raises(ValueError, match=r"--cpus and --memory: .*give --cluster too"):
        typed("--cpus 2 --memory 1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--cluster auto: a run that torchrun spreads"):
        typed("--cluster auto")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"--cluster needs Ray: pip install -e '.\[cluster\]'"):
        typed("--cluster auto")


@pytest.mark.parametrize(
    ("gpus", "runs"), [(1, 2), (0.5, 4), (0.2, 10), (0.1, 20), (0.3, 6), (2, 1), (3, 0)]
)  # fmt: skip
def test_a_node_has_room_for_every_share(gpus, runs):
    node = {"CPU": 32.0, "GPU": 2.0, "memory": 1e12}
    assert cluster._fit(node, {"CPU": 1.0, "GPU": gpus, "memory": 1e9}) == runs
    assert cluster._fit({"CPU": 32.0}, {"CPU": 1.0, "GPU": gpus}) == 0


def test_files_come_back_as_they_were(tmp_path):
    (tmp_path / "one" / "chain").mkdir(parents=True)
    (tmp_path / "one" / "scratch").mkdir()
    (tmp_path / "one" / "chain" / "link").write_bytes(b"\x00\xff")
    (tmp_path / "one" / "scratch" / "big").touch()
    files = cluster.read_folder(tmp_path / "one", without="scratch")
    assert files == {"chain/link": b"\x00\xff"}
    cluster.write_folder(tmp_path / "two", files)
    assert cluster.read_folder(tmp_path / "two", without="scratch") == files
