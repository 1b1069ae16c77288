"""Run many cells: each once, written atomically, several at a time, on one machine or on a cluster.

A cell is a frozen dataclass of JSON values that describes one run completely; its outcome is a dictionary of JSON
values. The next cells may depend on earlier outcomes (a learning rate is chosen before the remaining seeds are run), so
a sweep asks a *plan*: a pure function from the outcomes so far to the cells wanted. A sweep that was killed asks the
same function again and goes on where it stopped.

The sweep writes the outcomes, wherever its cells run (`engines`), and holds its folder's lock: a second sweep in the
folder is refused.

The digest in the name of a cell's folder is of its values alone. Code and files that a cell names (data, a model's
folder) are not in it: after a change there, use another folder. A new field in a cell's class changes every digest; old
outcomes stay in the folder and are not read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from experiments import hardware
from experiments.files import locked, write_atomically, write_folder
from experiments.report.progress import Progress
from experiments.sweep.cluster import Cluster, OnCluster
from experiments.sweep.engines import SCRATCH, Engine, InThisProcess, Pool, Ran, Runner, SweepError
from experiments.sweep.processes import together
from experiments.sweep.rate_search import Outcome

C = TypeVar("C")

OUTCOME = "outcome.json"
_LOOK = 30.0  # seconds between looks at a cluster's nodes


@dataclass(frozen=True)
class Sweep(Generic[C]):
    """A folder of outcomes and how to run a cell.

    Args:
        folder: for the outcomes; created if it does not exist.
        run: runs one cell.
        name: the readable start of a cell's folder name, before the digest.
        needs: the cells whose folders a cell reads; they are done before it.
    """

    folder: Path
    run: Runner
    name: Callable[[C], str] = lambda cell: type(cell).__name__.lower()
    needs: Callable[[C], Sequence[C]] = lambda cell: ()

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
        cluster: Cluster | None = None,
        expected: int | None = None,
        progress: bool = True,
        finished: Callable[[C, Outcome], None] = lambda cell, outcome: None,
    ) -> dict[C, Outcome]:
        """Run the cells that ``plan`` wants until it wants no more.

        Args:
            plan: outcomes so far -> all cells wanted, the most urgent first; done ones may be among them.
            workers: cells at a time, each in a separate process; 1 runs them in this process. None: one per core, or
                per GPU; on a cluster, as many as it has room for.
            threads: of each separate process; None: the cores are shared among them.
            cluster: run the cells there.
            expected: the number of cells in all, if known, for the estimate of the time left.
            progress: show a bar.
            finished: called once with each outcome, earlier ones included.

        Returns:
            Cell -> outcome, for the cells wanted in the end.

        Raises:
            SweepError: another sweep runs in the folder, a process died, a file cannot be read, or no node of the
                cluster can run a cell.
            OSError: the folder cannot be written, or the cluster not reached. Errors of the runner are passed on. In
                every case, running cells are waited for and kept.
        """
        if workers is not None and workers < 1:
            raise ValueError(f"workers={workers}: at least one is needed")
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        done: dict[C, Outcome] = {}
        running: dict[Future[Ran], C] = {}
        first, told = together()
        with (
            self._alone(),
            closing(self._engine(workers, threads, cluster)) as engine,
            self._kept(engine, running),
            Progress(total=expected or 0, unit="cell", disable=not progress, smoothing=0.1) as bar,
        ):
            while True:
                wanted = list(dict.fromkeys(plan(done)))
                for cell in [cell for cell in wanted if cell not in done and cell not in running.values()]:
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
                room = engine.room() - len(running)
                for cell in [cell for cell in open_ if cell not in running.values()][: max(0, room)]:
                    self.place(cell).mkdir(parents=True, exist_ok=True)
                    needed = [self.place(other) for other in self.needs(cell)]
                    running[engine.submit(self.run, cell, self.place(cell), needed)] = cell
                for future in wait(running, _LOOK, FIRST_COMPLETED).done:
                    cell = running.pop(future)
                    done[cell] = self._keep(cell, engine.result(future, self.name(cell)))
                    bar.set_postfix_str(self.name(cell), refresh=False)
                    bar.update()
                    finished(cell, done[cell])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder's lock, in the first process of a `torchrun`."""
        first, told = together()
        with locked(self.folder / "lock") if first else nullcontext(False) as held:
            if not told(held):
                raise SweepError(
                    f"another sweep runs in {self.folder}, and cells would be run twice: wait for it, or give another "
                    "folder by --out"
                )
            yield

    def _engine(self, workers: int | None, threads: int | None, cluster: Cluster | None) -> Engine:
        if cluster is not None:
            return OnCluster(cluster, self.folder, self.run.__module__.partition(".")[0], workers, threads)
        return InThisProcess() if workers == 1 else Pool(workers, threads)

    @contextmanager
    def _kept(self, engine: Engine, running: dict[Future[Ran], C]) -> Iterator[None]:
        """After an error, wait for the cells that are running; not if the user interrupts."""
        try:
            yield
        except Exception:
            with suppress(SweepError):
                while running and engine.room():  # unless the nodes that they wait for are gone
                    for future in wait(running, _LOOK, FIRST_COMPLETED).done:
                        cell = running.pop(future)
                        with suppress(Exception):  # the first error is the one to report
                            self._keep(cell, engine.result(future, self.name(cell)))
            raise

    def _keep(self, cell: C, ran: Ran) -> Outcome:
        """Write a cell's outcome, after the files that came with it."""
        if together()[0]:
            place = self.place(cell)
            write_folder(place, ran.files)
            made = ran.made | {"commit": hardware.commit()}  # a cluster's nodes have the code without its history
            text = json.dumps({"cell": as_json(cell), "outcome": ran.outcome, "made": made}, indent=1)
            write_atomically(place / OUTCOME, text)
            _clear(place)
        return dict(json.loads(json.dumps(ran.outcome)))


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
