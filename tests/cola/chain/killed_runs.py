"""Kill a training process again and again, resume it each time, and compare where it ends.

Run as ``python -m tests.cola.chain.killed_runs KILLS SEED``. It imports everything once, forks a process for every
attempt and prints one JSON line. An attempt dies by SIGKILL, which nothing can catch: at a random time, or at its n-th
event, which is a training step, a tie, or a call to the operating system that writes.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

import cola.lora.layer
from cola import Chain, ChainOptimizer, LinkConfig, PlateauKnots, StepKnots
from tests.models import BODY, Net, loss_of


class Normed(Net):
    """With running statistics, which move at every step."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype=dtype)
        self.norm = torch.nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x))


STEPS, EVERY = 12, 2  # steps of the run, steps between checkpoints
CASES = {
    "fp32": {"policy": lambda: StepKnots(every=3), "link": {"r": 2, "bias": "lora_only"}},
    "bf16 stochastic": {"dtype": torch.bfloat16, "policy": lambda: StepKnots(at=[2, 5, 8]), "link": {"r": (3, 1)}},
    "bf16 compensated": {
        "dtype": torch.bfloat16, "rounding": "compensated", "policy": lambda: StepKnots(every=2), "link": {"r": 1},
    },
    "plateau, dropout": {
        "policy": lambda: PlateauKnots(patience=0, window=2, threshold=0.9), "link": {"r": 2, "lora_dropout": 0.2},
    },
    "running statistics": {"model": Normed, "policy": lambda: StepKnots(every=3), "link": {"r": 1}},
}  # fmt: skip


def run(case: str, directory: Path) -> torch.Tensor:
    """The run from wherever its last checkpoint is; returns all weights, and base plus chain, as one tensor."""
    about = CASES[case]
    dtype = about.get("dtype", torch.float32)
    torch.manual_seed(5)
    model = about.get("model", Net)(dtype=dtype)
    opt = ChainOptimizer(
        torch.optim.AdamW, model, about["policy"](), link=LinkConfig(target_modules=BODY, **about["link"]),
        rounding=about.get("rounding", "auto"), seed=1, lr=0.03,
    )  # fmt: skip
    if (directory / "checkpoint.json").exists():
        opt.load(directory)
    while opt.steps < STEPS:
        opt.zero_grad()
        loss = loss_of(model, opt.steps, dtype)
        loss.backward()
        opt.observe(loss)
        opt.step()
        event("step")
        if opt.steps % EVERY == 0:
            opt.save(directory)
    opt.finish()
    opt.chain.save(directory / "chain")
    again = about.get("model", Net)(dtype=dtype)
    Chain.load(directory / "chain").apply(again)
    return torch.cat([p.double().flatten() for end in (model, again) for p in end.state_dict().values()])


# what dies when

events = 0
deadly: int | None = None


def event(name: str) -> None:
    """Count; die at the deadly one, and leave its name where the parent looks."""
    global events
    events += 1
    if events == deadly:
        os.write(3, name.encode()[:16])
        os.kill(os.getpid(), signal.SIGKILL)


def counted(function, name):
    """``function`` as an event, before it and after it."""

    def call(*args, **kwargs):
        event(f"before {name}")
        result = function(*args, **kwargs)
        event(f"after {name}")
        return result

    return call


def attempt(case: str, directory: Path, out: Path, deadly_event: int | None, seconds: float | None) -> tuple[bool, str]:
    """One forked process; returns whether it reached the end, and what it was doing when it was killed."""
    global deadly
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(write, 3)
            deadly = deadly_event
            os.fsync, os.replace, os.unlink = (
                counted(f, n) for f, n in ((os.fsync, "fsync"), (os.replace, "rename"), (os.unlink, "unlink"))
            )
            cola.lora.layer.tie_anywhere = counted(cola.lora.layer.tie_anywhere, "tie")
            weights = run(case, directory)
            out.write_text(json.dumps({"weights": weights.tolist(), "events": events}))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    where = os.read(read, 16).decode() or "any time"
    os.close(read)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return False, where
    assert os.WEXITSTATUS(status) == 0, "a resumed run failed: see the traceback above"
    return True, where


def main(kills: int, seed: int) -> None:
    """Kill ``kills`` times; print what happened."""
    dice = random.Random(seed)
    torch.set_num_threads(1)
    where, ends, wrong = Counter(), 0, []
    # what a process has in memory survives SIGKILL of another, so a disk in memory shows the same and is faster
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as place:
        run("fp32", Path(place) / "warm")  # whatever torch imports at first use, forks need not import again
        out, truth, length, duration = Path(place) / "out.json", {}, {}, {}
        for case in CASES:
            started = time.perf_counter()
            assert attempt(case, Path(place) / "undisturbed" / case, out, None, None)[0]
            duration[case] = time.perf_counter() - started
            result = json.loads(out.read_text())
            truth[case], length[case] = result["weights"], result["events"]
        while sum(where.values()) < kills:
            case = dice.choice(list(CASES))
            directory = Path(place) / "run"
            shutil.rmtree(directory, ignore_errors=True)
            done = False
            while not done:
                by_event = dice.random() < 0.7
                # the last attempts of a run are short: some die early, some reach the end
                nth = dice.randint(1, int(1.3 * length[case])) if by_event else None
                seconds = None if by_event else dice.random() * duration[case]
                out.unlink(missing_ok=True)
                done, what = attempt(case, directory, out, nth, seconds)
                if done:
                    ends += 1
                    if json.loads(out.read_text())["weights"] != truth[case]:
                        wrong.append(case)
                else:
                    where[what] += 1
    print(json.dumps({"kills": sum(where.values()), "ends": ends, "wrong": wrong, "where": where}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
