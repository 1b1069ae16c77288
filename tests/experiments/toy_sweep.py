"""A sweep whose cells take a moment and write down that they ran; run as a program, it can be killed."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.search import RateSearch
from experiments.sweep import Sweep

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
    if cell.arm == "dies":
        os._exit(9)
    if cell.arm == "tells":
        return {"process": os.getpid(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
    if cell.arm == "fails":
        raise ZeroDivisionError("on purpose")
    (folder / "kept").write_text(cell.arm)
    log(folder, f"end {folder.name}")
    return {"dev": abs(cell.lr - 0.4) + cell.seed / 1000}


def log(folder, line):
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


if __name__ == "__main__":
    Sweep(Path(sys.argv[1]), run, name).carry_out(
        plan(searches(float(sys.argv[2]))), workers=int(sys.argv[3]) or None, progress=False
    )
