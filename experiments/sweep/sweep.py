"""Run many cells: each once, written atomically, several at a time, on one machine or on several.

A cell is a frozen dataclass of JSON values that describes one run completely; its outcome is a dictionary of JSON
values. The next cells may depend on earlier outcomes (a learning rate is chosen before the remaining seeds are run), so
a sweep asks a *plan*: a pure function from the outcomes so far to the cells wanted. A sweep that was killed asks the
same function again and goes on where it stopped.

Processes that share a folder share the work. A cell runs under its lock, and a cell whose lock is taken is left to the
process that holds it. When nothing else is left, a sweep waits for the others' outcomes, or takes over from a process
that died.

The digest in the name of a cell's folder is of its values alone. Code and files that a cell names (data, a model's
folder) are not in it: after a change there, use another folder. A new field in a cell's class changes every digest; old
outcomes stay in the folder and are not read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from experiments import hardware
from experiments.files import locked, write_atomically
from experiments.report.progress import Progress
from experiments.sweep.processes import settle, start, together, unsettle
from experiments.sweep.rate_search import Outcome

C = TypeVar("C")
Runner = Callable[[Any, Path], Outcome]
"""``run(cell, folder) -> outcome``, importable by name; it may keep files in ``folder``."""

OUTCOME = "outcome.json"
SCRATCH = "scratch"
"""A folder for a cell's temporary files, inside its own; removed once the outcome is written."""
_PAUSE = 0.5  # seconds between looks at cells that other processes run
_MEMORY_SHARE = 0.8  # of the free memory, so that a somewhat larger cell still fits


class SweepError(RuntimeError):
    """A sweep cannot go on; finished cells are kept."""


@dataclass(frozen=True)
class Shard:
    """The ``index``-th of ``count`` parts of a sweep, from 0; written ``i/n``.

    Cells that belong together (the rates and seeds of one arm) form a group. All of a group is in one shard, because
    its later cells depend on its earlier ones.

    >>> Shard.parse("1/4")
    Shard(index=1, count=4)
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"--shard {self.index}/{self.count}: i must be from 0 to n − 1")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From ``i/n``.

        Raises:
            ValueError: the text is not two such integers.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise ValueError(f"--shard {text}: write i/n, such as 0/4 for the first of four")
        return cls(int(index), int(count))

    def has(self, group: int) -> bool:
        """Whether the ``group``-th group belongs to this shard."""
        return group % self.count == self.index


@dataclass(frozen=True)
class Sweep(Generic[C]):
    """A folder of outcomes and how to run a cell.

    Args:
        folder: for the outcomes; created if it does not exist.
        run: runs one cell.
        name: the readable start of a cell's folder name, before the digest.
    """

    folder: Path
    run: Runner
    name: Callable[[C], str] = lambda cell: type(cell).__name__.lower()

    def place(self, cell: C) -> Path:
        """The folder of a cell."""
        readable = "".join(c if c.isalnum() or c in "-_.+" else "_" for c in self.name(cell))[:80]
        return self.folder / "cells" / f"{readable}-{digest(cell)}"

    def read(self, cell: C) -> Outcome | None:
        """The outcome of a cell; None if it has not been run.

        Raises:
            SweepError: the file is not an outcome, or belongs to another cell.
        """
        return _read(self.place(cell) / OUTCOME, cell)

    def carry_out(
        self,
        plan: Callable[[Mapping[C, Outcome]], Sequence[C]],
        *,
        workers: int | None = None,
        threads: int | None = None,
        expected: int | None = None,
        progress: bool = True,
        finished: Callable[[C, Outcome], None] = lambda cell, outcome: None,
    ) -> dict[C, Outcome]:
        """Run the cells that ``plan`` wants until it wants no more.

        Args:
            plan: outcomes so far -> all cells wanted, the most urgent first; done ones may be among them.
            workers: cells at a time, each in a separate process; 1 runs them in this process. None: one per core (or
                GPU), but no more than fit the memory, judged by the first cell's peak.
            threads: of each separate process; None: the cores are shared among them.
            expected: the number of cells in all, if known, for the estimate of the time left.
            progress: show a bar.
            finished: called once with each outcome, earlier ones included.

        Returns:
            Cell -> outcome, for the cells wanted in the end.

        Raises:
            SweepError: a process died, or a file cannot be read.
            OSError: the folder cannot be written. Errors of the runner are passed on. In every case, running cells are
                waited for and kept.
        """
        if workers is not None and workers < 1:
            raise ValueError(f"workers={workers}: at least one is needed")
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        done: dict[C, Outcome] = {}
        first, told = together()
        with (
            _Pool(self, workers, threads) as pool,
            Progress(total=expected or 0, unit="cell", disable=not progress, smoothing=0.1) as bar,
        ):
            while True:
                wanted = list(dict.fromkeys(plan(done)))
                running = set(pool.running.values())  # the pool reports these
                for cell in [cell for cell in wanted if cell not in done and cell not in running]:
                    found = told(self.read(cell) if first else None)
                    if found is not None:
                        done[cell] = found
                        if first:
                            _clear(self.place(cell))  # a kill may have left it after the outcome
                        if not bar.disable:
                            # not run now, so it must not count in the rate
                            bar.initial += 1
                            bar.n += 1
                        finished(cell, found)
                open_ = [cell for cell in wanted if cell not in done]
                if not open_:
                    if set(plan(done)) <= set(done):
                        bar.total = len(done)  # the expected number was an estimate
                        bar.refresh()
                        return {cell: done[cell] for cell in wanted}
                    continue
                bar.total = max(expected or 0, len(done) + len(open_))
                bar.refresh()
                for cell, outcome in pool.some(open_):
                    done[cell] = outcome
                    bar.set_postfix_str(self.name(cell), refresh=False)
                    bar.update()
                    finished(cell, outcome)


class _Pool:
    """Runs cells in this process or in several, as many at a time as there is room for.

    Cells that another sweep is running are skipped for a while.
    """

    def __init__(self, sweep: Sweep[Any], workers: int | None, threads: int | None) -> None:
        self.sweep, self.workers, self.threads = sweep, workers, threads
        self.room = workers or 1
        self.running: dict[Future[tuple[Outcome, hardware.Peak] | None], Any] = {}
        self.elsewhere: set[Any] = set()
        self.executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Pool:
        if self.workers == 1:
            self.flushed = settle()
        else:
            most = self.workers or hardware.most_workers()
            # a forked copy of a process that has used torch's thread pool may hang
            context = multiprocessing.get_context("spawn")
            threads = self.threads or max(1, hardware.cores() // most)
            gpus, devices = context.SimpleQueue(), hardware.gpus()
            for index in range(most if devices else 0):
                gpus.put(devices[index % len(devices)])
            self.executor = ProcessPoolExecutor(
                most, context, initializer=start, initargs=(threads, gpus if devices else None)
            )
            self.most = most
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.executor is not None:
            self.executor.shutdown(wait=True, cancel_futures=True)
        else:
            unsettle(self.flushed)

    def some(self, cells: Sequence[Any]) -> Iterator[tuple[Any, Outcome]]:
        """Start cells while there is room, and yield those that finish next; none if others run all that are left."""
        if self.executor is None:
            for cell in cells:
                ran = run_one(self.sweep.run, cell, self.sweep.place(cell))
                if ran is not None:
                    yield cell, ran[0]
                    return
            time.sleep(_PAUSE)
            return
        started = {*self.running.values(), *self.elsewhere}
        for cell in cells:
            if len(self.running) >= self.room:
                break
            if cell not in started:
                future = self.executor.submit(run_one, self.sweep.run, cell, self.sweep.place(cell))
                self.running[future] = cell
        ready, _ = wait(self.running, _PAUSE if self.elsewhere else None, FIRST_COMPLETED)
        if not ready:
            if not self.running:
                time.sleep(_PAUSE)
            self.elsewhere.clear()  # look again
        for future in ready:
            cell = self.running.pop(future)
            try:
                ran = future.result()
            except BrokenProcessPool:
                raise SweepError(
                    f"a process died while running {self.sweep.name(cell)} or another cell (out of memory?); finished "
                    "cells are kept: start the sweep again, with fewer --workers"
                ) from None
            if ran is None:
                self.elsewhere.add(cell)
                continue
            outcome, peak = ran
            if self.workers is None:
                self.room = max(1, min(self.most, peak.how_many(_MEMORY_SHARE)))
            yield cell, outcome


def run_one(run: Runner, cell: Any, place: Path) -> tuple[Outcome, hardware.Peak] | None:
    """Run one cell under its lock and write its outcome, unless it has one by then.

    The processes of one `torchrun` run the cell together: the first of them holds the lock and writes.

    Returns:
        The outcome and the peak memory; None if another sweep is running the cell.
    """
    place.mkdir(parents=True, exist_ok=True)
    first, told = together()
    with locked(place / "lock") if first else nullcontext(False) as held:
        if not told(held):
            return None
        found = told(_read(place / OUTCOME, cell) if first else None)
        if found is not None:
            return found, hardware.Peak.now()
        started, cpu = time.perf_counter(), time.process_time()
        outcome = run(cell, place)
        if not first:
            return outcome, hardware.Peak.now()
        made = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            **hardware.provenance(),
        }
        write_atomically(
            place / OUTCOME, json.dumps({"cell": as_json(cell), "outcome": outcome, "made": made}, indent=1)
        )
        _clear(place)
        return json.loads(json.dumps(outcome)), hardware.Peak.now()


def _read(path: Path, cell: Any) -> Outcome | None:
    try:
        written = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SweepError(f"{path} cannot be read ({error}): delete it, and the cell is run again") from None
    if not isinstance(written, dict) or written.get("cell") != as_json(cell) or "outcome" not in written:
        raise SweepError(f"{path} is not the outcome of this cell: delete it, and the cell is run again")
    return dict(written["outcome"])


def _clear(place: Path) -> None:
    shutil.rmtree(place / SCRATCH, ignore_errors=True)


def as_json(cell: Any) -> dict[str, Any]:
    """A cell as JSON values."""
    return dict(json.loads(json.dumps(dataclasses.asdict(cell))))


def digest(cell: Any) -> str:
    """Ten hexadecimal digits of everything in a cell."""
    text = json.dumps(as_json(cell), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
