"""Truncation of a long chain against a dense SVD of its update; the import of cola against that of torch."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import torch

from cola import Chain, Factor, KnotReport, Link
from experiments.bench.measure import CLOCKS, Row, Settings, Spread, medians, race, ratio

RANK = 8


def cases() -> Iterator[tuple[str, object]]:
    """Name and function of each group of rows."""
    yield "export", svd
    yield "import", importing


def svd(settings: Settings) -> Iterator[Row]:
    """The whole export at rank 16 of a chain of 100 links, against only the decomposition of the dense update."""
    links, d, r = (4, 64, 16) if settings.smoke else (100, 4096, 16)
    g = settings.generator()
    report = KnotReport(0, 0, RANK, 0.0, 0.0, None, 0.0)
    pairs = [(torch.randn(RANK, d, generator=g), torch.randn(d, RANK, generator=g)) for _ in range(links)]
    chain = Chain(Link(i, 0, {"proj": Factor(A, B, 2.0, "nearest")}, {}, report) for i, (A, B) in enumerate(pairs))
    update = 2.0 * torch.cat([B for _, B in pairs], dim=1) @ torch.cat([A for A, _ in pairs])
    ours, errors, missed, clock = [], {}, 0.0, CLOCKS[settings.clock]
    for _ in range(2 if settings.smoke else 4):
        with tempfile.TemporaryDirectory() as directory:
            started = clock()
            errors = chain.to_peft(directory, r=r)
            ours.append(clock() - started)
            written = Chain.from_peft(directory)[0].factors["proj"].delta(torch.float32)
        missed = (update - written).double().norm().item()
    # once, in single precision, the faster one: it takes a minute or more
    started = clock()
    _, values, _ = torch.linalg.svd(update, full_matrices=False)
    dense = clock() - started
    wanted = values[r:].double().square().sum().sqrt().item()
    total = links * RANK
    yield Row(
        "export/svd", f"export with SVD to rank {r}, Σr = {total}, d = {d}, in float64, files written: times faster "
        "than a dense SVD in fp32", Spread.of(dense / np.array(ours[1:])), 20.0, at_least=True,
        limit=20 * d**3 / (2 * 4 * d * total**2 + 20 * total**3),
        limited_by="FLOPs: two QRs of d×Σr and an SVD of Σr×Σr for one of d×d",
        between="float64 runs at half the rate; the norm of the update takes another decomposition",
        right=all(abs(error - wanted) <= 1e-3 * wanted for error in (errors["proj"], missed)),  # reported, and written
        details={"dense_s": dense, "export_s": float(np.median(ours[1:]))},
    )  # fmt: skip


def importing(settings: Settings) -> Iterator[Row]:
    """Imports in fresh processes."""

    def start(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    work = {"both": lambda: start("import torch, cola"), "torch": lambda: start("import torch")}
    wall = Settings(seed=settings.seed, seconds=5 * settings.seconds, smoke=settings.smoke)
    times = race(work, wall, rounds=(7, 15))
    yield Row(
        "import", "import torch, cola: time to import torch", ratio(times, "both", "torch"), 1.1, limit=1.0,
        limited_by="torch itself", between="some thirty small modules", details=medians(times),
    )  # fmt: skip
