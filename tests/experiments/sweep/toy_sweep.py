"""A sweep whose cells take a moment and write down that they ran; run as a program, it can be killed."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.files import write_atomically
from experiments.sweep import Cluster, RateSearch, Sweep

RATES = (0.1, 0.2, 0.4, 0.8)


class Odd(Exception):
    """Cannot be unpickled, as some libraries' errors cannot."""

    def __init__(self, message, *, response):
        super().__init__(message)


@dataclass(frozen=True)
class Toy:
    arm: str
    lr: float
    seed: int
    nap: float = 0.0


def run(cell, folder):
    log(folder, f"start {folder.name}")
    while cell.arm == "waits" and "start fails" not in (folder.parent.parent / "log").read_text():
        time.sleep(0.01)
    time.sleep(cell.nap)
    if cell.arm == "hangs" and not (folder / "hung").exists():  # the first time
        write_atomically(folder / "hung", str(os.getpid()))
        time.sleep(3600)
    if cell.arm == "reads":
        (other,) = needs(cell)
        return {"read": (folder.parent / sweep(folder).place(other).name / "kept").read_text()}
    if cell.arm == "dies":
        os._exit(9)
    if cell.arm == "tells":
        import torch

        gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
        return {"process": os.getpid(), "gpu": gpu, "threads": torch.get_num_threads()}
    if cell.arm == "odd":
        raise Odd("the hub refuses", response=403)
    if cell.arm == "exits":
        raise SystemExit("no such option")
    if cell.arm == "fails":
        raise ZeroDivisionError("on purpose")
    (folder / "kept").write_text(cell.arm)
    log(folder, f"end {folder.name}")
    return {"dev": abs(cell.lr - 0.4) + cell.seed / 1000}


def log(folder, line):
    with (folder.parent.parent / "log").open("a") as file:  # O_APPEND: whole lines, whoever writes
        file.write(f"{line} {os.getpid()}\n")


def name(cell):
    return f"{cell.arm}-{cell.lr:g}-{cell.seed}"


def needs(cell):
    return [Toy("a", cell.lr, cell.seed)] if cell.arm == "reads" else []


def sweep(folder):
    return Sweep(folder, run, name, needs)


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


if __name__ == "__main__":
    folder, nap, workers, *address = sys.argv[1:]
    cluster = Cluster(*address, gpus=0) if address else None
    sweep(Path(folder)).carry_out(plan(searches(float(nap))), workers=int(workers), cluster=cluster, progress=False)
