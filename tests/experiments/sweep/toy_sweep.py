"""A sweep whose cells take a moment and write down that they ran; run as a program, it can be killed."""

import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.sweep import RateSearch, Sweep

RATES = (0.1, 0.2, 0.4, 0.8)


@dataclass(frozen=True)
class Toy:
    arm: str
    lr: float
    seed: int
    nap: float = 0.0


def run(cell, folder):
    log(folder, f"start {folder.name}")
    time.sleep(cell.nap)
    if cell.arm == "meets":  # not over before another sweep runs a cell too
        deadline = time.monotonic() + 300  # rather than for ever
        while len({line.split()[2] for line in (folder.parent.parent / "log").read_text().splitlines()}) < 2:
            assert time.monotonic() < deadline, "no other sweep came"
            time.sleep(0.01)
    if cell.arm == "hangs" and not (folder / "hung").exists():  # the first time
        (folder / "hung").touch()
        time.sleep(3600)
    if cell.arm == "dies":
        os._exit(9)
    if cell.arm == "tells":
        import torch

        gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
        return {"process": os.getpid(), "gpu": gpu, "threads": torch.get_num_threads()}
    if cell.arm == "fails":
        raise ZeroDivisionError("on purpose")
    (folder / "kept").write_text(cell.arm)
    log(folder, f"end {folder.name}")
    return {"dev": abs(cell.lr - 0.4) + cell.seed / 1000}


def log(folder, line):
    process = multiprocessing.parent_process()  # of a worker: the sweep
    line += f" {os.getpid() if process is None else process.pid}"
    with (folder.parent.parent / "log").open("a") as file:  # O_APPEND: whole lines, whoever writes
        file.write(line + "\n")


def name(cell):
    return f"{cell.arm}-{cell.lr:g}-{cell.seed}"


def searches(nap=0.0, arms=("a", "b", "c")):
    return {
        arm: RateSearch(
            cell=lambda lr, seed, arm=arm: Toy(arm, lr, seed, nap),
            rates=RATES,
            start=(0.1,),
            search_seeds=(0,),
            seeds=(0, 1, 2),
            loss=lambda outcome: outcome["dev"],
        )
        for arm in arms
    }


def plan(of):
    return lambda done: [cell for search in of.values() for cell in search.wanted(done)]


def some(arm, count):
    """A plan of ``count`` cells of one arm, and then of one more that depends on them."""
    cells = [Toy(arm, 0.1, seed) for seed in range(count)]
    return lambda done: [*cells, *([Toy("last", 0.1, 0)] if set(cells) <= set(done) else [])]


if __name__ == "__main__":
    folder, what, workers = sys.argv[1:]
    wanted = some(what, 2 * int(workers)) if what.isalpha() else plan(searches(float(what)))
    Sweep(Path(folder), run, name).carry_out(wanted, workers=int(workers) or None, progress=False)
