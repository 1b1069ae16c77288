"""Paired, interleaved timing, peaks of allocated memory, and rows with a target and a limit."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from experiments.memory import peak_memory

Work = Callable[[], object]
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        seed: of all data, and of the order within each round.
        seconds: to spend on one comparison, approximately.
        smoke: small sizes and few rounds, for a trial.
        clock: ``"wall"``, or ``"cpu"``, the process's own time, for one thread on a machine with other work.
        model: of the rows on a real model; None for the default.
        gpu: measure the rows of a GPU, on a GPU if torch has one.
    """

    seed: int = 0
    seconds: float = 3.0
    smoke: bool = False
    clock: str = "wall"
    model: str | None = None
    gpu: bool = False

    def generator(self) -> torch.Generator:
        """A fresh generator of the run's seed."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def device(self) -> str:
        """Where to measure: ``"cuda"``, or ``"cpu"`` for the rows of the CPU and for a trial without a GPU."""
        return "cuda" if self.gpu and torch.cuda.is_available() else "cpu"

    def now(self) -> float:
        """The clock's seconds, once the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return CLOCKS[self.clock]()


@dataclass(frozen=True)
class Spread:
    """Median, 10 % and 90 % points of repeated measurements."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of one or more values."""
        data = np.asarray(list(values), dtype=float)
        low, median, high = np.percentile(data, [10, 50, 90])
        return cls(float(median), float(low), float(high), len(data))

    def __str__(self) -> str:
        digits = f"{self.median:.4g}"
        return digits if self.count == 1 else f"{digits} ({self.low:.4g}–{self.high:.4g})"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: ``group/…``, by which rows are chosen.
        what: the measurement in words.
        value: measured.
        target: to reach; None if the row only informs.
        at_least: whether the value should be above its target, not below.
        limit: the bound of arithmetic and bandwidth; None if there is none.
        limited_by: the source of the limit.
        floor: the time of the same work without our additions, in the same rounds; None if it is not measured.
        between: the reasons why the value is above its limit.
        right: whether the results were correct; None if there is nothing to compare.
        details: other figures of the same run.
    """

    name: str
    what: str
    value: Spread
    target: float | None = None
    at_least: bool = False
    limit: float | None = None
    limited_by: str = ""
    floor: Spread | None = None
    between: str = ""
    right: bool | None = None
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the target."""
        if self.target is None:
            return None
        return self.value.median >= self.target if self.at_least else self.value.median <= self.target

    @property
    def out_of_reach(self) -> bool:
        """Whether the target lies below the floor, and below nine in ten of its rounds."""
        return self.target is not None and self.floor is not None and not self.at_least and self.target < self.floor.low


def warm_heap() -> None:
    """Make the C library keep freed memory of up to 32 MB, as it does once a training process has freed so much.

    Until then it gives freed activations back, and the next contender pays for hundreds of page faults.
    """
    torch.empty(1 << 25, dtype=torch.uint8).fill_(1)


def race(work: Mapping[str, Work], settings: Settings, rounds: tuple[int, int] = (7, 400)) -> dict[str, np.ndarray]:
    """Seconds of each contender in each round.

    Every round runs all contenders once, in a random order, after two rounds to warm up. Short work is repeated until
    one reading takes a millisecond or more. Compare within rounds (`ratio`): a disturbance affects a whole round.

    Args:
        work: by name.
        settings: ``seconds`` bounds the whole.
        rounds: least and greatest number.
    """
    order, names = random.Random(settings.seed), list(work)
    clock = settings.now
    single = {}
    for name in names * 2:
        started = clock()
        work[name]()
        single[name] = clock() - started
    again = {name: max(1, min(1000, round(1e-3 / max(single[name], 1e-7)))) for name in names}
    per_round = sum(single[name] * again[name] for name in names)
    least, most = (2, 3) if settings.smoke else rounds
    count = int(min(most, max(least, settings.seconds / max(per_round, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(count):
            order.shuffle(names)
            for name in names:
                repeat, run = range(again[name]), work[name]
                started = clock()
                for _ in repeat:
                    run()
                times[name].append((clock() - started) / again[name])
    finally:
        if collecting:
            gc.enable()
    return {name: np.array(values) for name, values in times.items()}


def ratio(times: Mapping[str, np.ndarray], one: str, other: str) -> Spread:
    """Spread of the ratios within rounds."""
    return Spread.of(times[one] / np.maximum(times[other], 1e-9))


def medians(times: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Median milliseconds of each contender, for `Row.details`."""
    return {f"{name}_ms": float(np.median(values)) * 1e3 for name, values in times.items()}


def peak_bytes(run: Work, device: str = "cpu") -> int:
    """The peak of the memory that ``run`` allocated, as torch's allocator counts it."""
    run()
    if device == "cuda":
        before, peak = peak_memory(run, device)
        return peak - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def saved_bytes(module: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes of the distinct storages that one forward pass keeps for backward; parameters do not count, x does."""
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in known)
