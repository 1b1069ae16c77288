"""Where the cells of a sweep run: in this process, in processes of this machine, or on a cluster (`cluster`)."""

from __future__ import annotations

import copy
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from experiments import hardware
from experiments.sweep.processes import settle, start, unsettle
from experiments.sweep.rate_search import Outcome

Runner = Callable[[Any, Path], Outcome]
"""``run(cell, folder) -> outcome``, importable by name; it may keep files in ``folder``."""

SCRATCH = "scratch"
"""A folder for a cell's temporary files, inside its own; removed once the outcome is written."""


class SweepError(RuntimeError):
    """A sweep cannot go on; finished cells are kept."""


class Ran(NamedTuple):
    """A cell that was run.

    Attributes:
        outcome: what the runner returned.
        made: seconds, versions and hardware.
        files: the files that it left, by their path in the cell's folder, if they are not in the sweep's folder yet.
    """

    outcome: Outcome
    made: dict[str, Any]
    files: Mapping[str, bytes] = {}


class Engine(Protocol):
    """Runs cells; `close` waits for those that are running."""

    def room(self) -> int:
        """How many cells may run at once.

        Raises:
            SweepError: none can, ever.
        """

    def submit(self, run: Runner, cell: Any, place: Path, needed: Sequence[Path]) -> Future[Ran]:
        """Begin a cell in the folder ``place``; it reads the folders ``needed`` of earlier ones."""

    def result(self, future: Future[Ran], name: str) -> Ran:
        """A cell's result.

        Raises:
            SweepError: its process died. Errors of the runner are passed on.
        """

    def close(self) -> None:
        """Release processes and connections."""


def run_one(run: Runner, cell: Any, place: Path) -> Ran:
    """Run one cell, and measure it."""
    started, cpu = time.perf_counter(), time.process_time()
    outcome = run(cell, place)
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    return Ran(outcome, seconds | hardware.provenance())


def run_apart(run: Runner, cell: Any, place: Path) -> Ran:
    """`run_one` in another process than the sweep's.

    Raises:
        SweepError: the runner's error cannot be sent from one process to another, or would end the process; has its
            name and its text.
    """
    try:
        return run_one(run, cell, place)
    except SystemExit as error:
        raise SweepError(f"{place.name} raised SystemExit: {error}") from error
    except Exception as error:
        try:
            copy.deepcopy(error)  # takes it apart and together again, as sending does
        except Exception:  # such an error would be taken for the death of the process
            raise SweepError(f"{place.name} raised {type(error).__name__}: {error}") from error
        raise


class InThisProcess:
    """One cell at a time, here. The processes of one `torchrun` run each cell together."""

    def __init__(self) -> None:
        self.flushed = settle()

    def room(self) -> int:
        """One."""
        return 1

    def submit(self, run: Runner, cell: Any, place: Path, needed: Sequence[Path]) -> Future[Ran]:
        """Run the cell now; an error of the runner is raised here."""
        done: Future[Ran] = Future()
        done.set_result(run_one(run, cell, place))
        return done

    def result(self, future: Future[Ran], name: str) -> Ran:
        """See `Engine`."""
        return future.result()

    def close(self) -> None:
        """Restore the settings of this process."""
        unsettle(self.flushed)


class Pool:
    """Processes of this machine, each with its share of the cores, and one of the GPUs if there are any.

    Args:
        workers: how many; None: one per core, or per GPU.
        threads: of each; None: the cores are shared among them.
    """

    def __init__(self, workers: int | None, threads: int | None) -> None:
        self.workers = workers or hardware.most_workers()
        # a forked copy of a process that has used torch's thread pool may hang
        context = multiprocessing.get_context("spawn")
        gpus, devices = context.SimpleQueue(), hardware.gpus()
        for index in range(self.workers if devices else 0):
            gpus.put(devices[index % len(devices)])
        threads = threads or max(1, hardware.cores() // self.workers)
        self.executor = ProcessPoolExecutor(
            self.workers, context, initializer=start, initargs=(threads, gpus if devices else None)
        )

    def room(self) -> int:
        """As many as there are processes."""
        return self.workers

    def submit(self, run: Runner, cell: Any, place: Path, needed: Sequence[Path]) -> Future[Ran]:
        """See `Engine`."""
        return self.executor.submit(run_apart, run, cell, place)

    def result(self, future: Future[Ran], name: str) -> Ran:
        """See `Engine`."""
        try:
            return future.result()
        except BrokenProcessPool:
            raise SweepError(
                f"a process died while running {name} or another cell (out of memory?); finished cells are kept: "
                "start the sweep again, with fewer --workers"
            ) from None

    def close(self) -> None:
        """Wait for the processes."""
        self.executor.shutdown(wait=True, cancel_futures=True)
