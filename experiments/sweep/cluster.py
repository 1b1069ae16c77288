"""Run the cells of a sweep as tasks of a Ray cluster."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import socket
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import experiments
from experiments.files import read_folder, write_atomically, write_folder
from experiments.report.noise import without_noise
from experiments.sweep.engines import SCRATCH, Ran, Runner, SweepError, run_apart
from experiments.sweep.processes import processes, settle

RETRIES = 3
"""How often a cell is begun again whose node or process was lost."""
_MARK = ".cluster"
_PACKAGES = ("cola", "experiments", "theory")
_SECONDS = 5.0  # for an address to answer
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and the share of a node that a cell gets.

    Args:
        address: ``auto``, the cluster that this machine is part of, or ``HOST:PORT``.
        cpus: whole cores; torch gets as many threads.
        gpus: may be a fraction. None: one if a node of the cluster has one.
        memory: gigabytes that Ray sets aside; None: not counted.
    """

    address: str
    cpus: int = 1
    gpus: float | None = None
    memory: float | None = None


def requested(arguments: argparse.Namespace) -> Cluster | None:
    """The cluster that the arguments of `command_line.add_whereabouts` name, if any.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: a share of a node without a cluster, or a cluster under `torchrun`.
    """
    share = {name: getattr(arguments, name) for name in ("cpus", "gpus", "memory")}
    share = {name: value for name, value in share.items() if value is not None}
    if arguments.cluster is None:
        if share:
            raise ValueError(f"--{' and --'.join(share)}: that is a run's share of a node; give --cluster too")
        return None
    if processes() > 1:
        raise ValueError(f"--cluster {arguments.cluster}: a run that torchrun spreads stays on its machine; choose one")
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("--cluster needs Ray: pip install -e '.[cluster]'", name="ray")
    return Cluster(arguments.cluster, **share)


class OnCluster:
    """Cells as Ray tasks, as many at a time as the nodes have room for.

    A task enters the sweep's folder if its node can see it. Otherwise it works in a temporary folder: the folders it
    needs are sent, and the files it leaves are sent back.

    Args:
        cluster: which, and a cell's share of a node.
        folder: the sweep's.
        package: another one that the cells' runner needs, from this checkout.
        workers: cells at a time, at most.
        threads: of a cell; None: as many as its cores.

    Raises:
        OSError: the cluster cannot be reached.
        SweepError: no node has the share.
    """

    def __init__(self, cluster: Cluster, folder: Path, package: str, workers: int | None, threads: int | None) -> None:
        _require_answer(cluster.address)
        import ray

        self.cluster, self.workers, self.threads = cluster, workers, threads or cluster.cpus
        self.mark = (folder.absolute() / _MARK, uuid.uuid4().hex)
        write_atomically(*self.mark)
        root = Path(experiments.__file__).parents[1]
        shipped = {*_PACKAGES, package}
        environment = {name: os.environ[name] for name in _OFFLINE if name in os.environ}
        if cluster.gpus == 0:  # Ray would leave all of the node's visible
            environment["CUDA_VISIBLE_DEVICES"] = ""
        try:
            ray.init(
                address=cluster.address,
                logging_level=logging.ERROR,
                runtime_env={
                    "working_dir": str(root),
                    "excludes": [f"/{path.name}" for path in root.iterdir() if path.name not in shipped],
                    "env_vars": environment,
                    "worker_process_setup_hook": f"{without_noise.__module__}.{without_noise.__name__}",
                },
            )
        except (ConnectionError, RuntimeError, SystemExit) as error:  # Ray's core leaves the program
            raise ConnectionError(f"--cluster {cluster.address}: no connection to Ray: {error}") from error
        self.ray, self.task = ray, ray.remote(_on_node)
        try:
            gpus = cluster.gpus
            if gpus is None:
                gpus = min(1.0, max(node["Resources"].get("GPU", 0) for node in self._nodes()))
            share = {"CPU": float(cluster.cpus), "GPU": gpus, "memory": (cluster.memory or 0) * 1e9}
            self.share = {name: amount for name, amount in share.items() if amount}
            self.room()
        except BaseException:
            self.close()
            raise

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def room(self) -> int:
        """As many as the nodes have room for now, and at most ``workers``."""
        nodes = [node["Resources"] for node in self._nodes()]
        fit = sum(_fit(node, self.share) for node in nodes)
        if not fit:
            raise SweepError(
                f"no node of the cluster has {_in_words(self.share)}, and the runs would wait for ever; its nodes have "
                f"{'; '.join(map(_in_words, nodes)) or 'nothing'}: ask for less by --cpus, --gpus or --memory"
            )
        return min(fit, self.workers or fit)

    def submit(self, run: Runner, cell: Any, place: Path, needed: Sequence[Path]) -> Future[Ran]:
        """See `Engine`; a cell whose node was lost is begun again elsewhere."""
        sent = {folder.name: read_folder(folder, without=SCRATCH) for folder in needed}
        options = self.task.options(
            num_cpus=self.share["CPU"],
            num_gpus=self.share.get("GPU", 0),
            memory=int(self.share.get("memory", 0)) or None,
            max_retries=RETRIES,
            name=place.name,
        )
        began = options.remote(run, cell, place.absolute(), sent, self.mark, Path.cwd(), self.threads)
        future: Future[Ran] = began.future()
        return future

    def result(self, future: Future[Ran], name: str) -> Ran:
        """See `Engine`."""
        try:
            return future.result()
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error  # the runner's own
        except self.ray.exceptions.RayError as error:
            raise SweepError(
                f"{name} was begun {1 + RETRIES} times, and its process or node was lost each time (out of memory?); "
                f"finished cells are kept: start the sweep again, with more --memory. Ray says: {error}"
            ) from error

    def close(self) -> None:
        """Disconnect; Ray ends the tasks that are still running."""
        self.ray.shutdown()


def _require_answer(address: str) -> None:
    """Refuse an address where nobody answers: Ray would try for a minute, and then leave the program."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal():
        raise ConnectionError(f"--cluster {address}: give auto or HOST:PORT, as `ray start` prints it")
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"--cluster {address}: nobody answers there ({error}); does `ray start` run?") from error


def _fit(node: Mapping[str, float], share: Mapping[str, float]) -> int:
    """How many shares a node has; 1 // 0.2 would be 4."""
    return int(min(node.get(name, 0) / amount for name, amount in share.items()) + 1e-6)


def _in_words(resources: Mapping[str, float]) -> str:
    """Such as ``2 CPUs, 1 GPU, 8.0 GB``."""
    cpus, gpus, memory = (resources.get(name, 0) for name in ("CPU", "GPU", "memory"))
    parts = [f"{number:g} {name}{'' if number == 1 else 's'}" for number, name in ((cpus, "CPU"), (gpus, "GPU"))]
    return ", ".join([*parts, *([f"{memory / 1e9:.1f} GB"] if memory else [])])


def _on_node(
    run: Runner, cell: Any, place: Path, sent: Mapping[str, Mapping[str, bytes]], mark: tuple[Path, str], cwd: Path,
    threads: int,
) -> Ran:  # fmt: skip
    """Run a cell on a node of the cluster."""
    settle(threads)
    if cwd.is_dir():  # for relative paths that the cell names
        os.chdir(cwd)
    path, text = mark
    if path.is_file() and path.read_text() == text:
        return run_apart(run, cell, place)
    with tempfile.TemporaryDirectory() as root:
        cells = Path(root) / "cells"
        for name, files in sent.items():
            write_folder(cells / name, files)
        own = cells / place.name
        own.mkdir(parents=True)
        ran = run_apart(run, cell, own)
        return ran._replace(files=read_folder(own, without=SCRATCH))
