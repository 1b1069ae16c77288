"""The measurement behind `rounding="auto"`: the cost of each rounding of a tie in a half-precision run, end to end.

    python -m experiments rounding

The tiny OPT is stored in bf16 (or fp16) and fine-tuned on prose by chains of a few and of many links, whose
updates are small compared with the weights. Each run is repeated with every rounding and with an exact chain (the same
half-precision starting weights, kept in fp32). The result is the held-out loss of the final weights, as a difference
from the exact chain, paired by seed. The part of the links' sum that arrived in the weights explains it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cola import ChainOptimizer, EvenKnots, LinkConfig
from experiments.command_line import add_seeds, count, positive, seeds_of
from experiments.hardware import describe_processor
from experiments.report import stats
from experiments.report.progress import Progress
from experiments.study.training import train
from experiments.tiny import corpus, tiny_opt
from experiments.tiny.loss import bits_per_byte

EXACT = "exact (fp32)"
ROUNDINGS = (EXACT, "nearest", "stochastic", "compensated")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
BATCH = 4


@dataclass(frozen=True)
class Cell:
    """One run: storage dtype, rounding, links, learning rate, seed."""

    dtype: str
    rounding: str
    links: int
    lr: float
    seed: int


@dataclass(frozen=True)
class Measured:
    """The outcome of a run.

    Attributes:
        bits: held-out bits per byte of the final weights, evaluated in fp32.
        size: median over links and layers of ‖ΔW‖/‖W‖.
        survival: <W' − W, ΣΔW> / ‖ΣΔW‖² over all adapted layers: 1 when nothing is lost on average.
        error: ‖W' − W − ΣΔW‖ / ‖ΣΔW‖.
    """

    bits: float
    size: float
    survival: float
    error: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m experiments rounding`."""
    parser.add_argument("--out", type=Path, default=Path("runs/rounding"), metavar="DIR", help="folder to write")
    add_seeds(parser, 5)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="storage of the weights")
    parser.add_argument("--links", nargs="+", type=count, default=[3, 24], metavar="N", help="chain lengths")
    parser.add_argument("--lr", nargs="+", type=positive, default=[1e-4, 2e-3], metavar="RATE",
                        help="learning rates")  # fmt: skip
    parser.add_argument("--steps", type=count, default=120, metavar="N", help="optimizer steps per run")
    parser.add_argument("--model", type=Path, metavar="DIR",
                        help="folder that pretrain wrote, over bytes (default: the committed tiny OPT)")  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m experiments rounding`.

    Returns:
        0; 1 if the exact chain lost anything, which voids the comparison; 2 for bad arguments.
    """
    tiny_opt.quiet()
    folder = arguments.model or tiny_opt.COMMITTED
    try:
        tiny_opt.load(folder)
        if max(arguments.links) > arguments.steps:
            raise ValueError(
                f"--links {max(arguments.links)} in --steps {arguments.steps}: a link needs at least one step"
            )
    except (OSError, ValueError) as error:
        print(f"rounding: {error}", file=sys.stderr)
        return 2
    cells = [
        Cell(dtype, rounding, links, lr, seed)
        for dtype in arguments.dtypes
        for links in arguments.links
        for lr in arguments.lr
        for seed in seeds_of(arguments)
        for rounding in ROUNDINGS  # innermost: the roundings of a seed run in a row
    ]
    prose = corpus.prose()
    results = {cell: run(cell, arguments.steps, prose, folder) for cell in Progress(cells, unit="run")}
    with (arguments.out / "rounding.jsonl").open("w") as lines:
        for cell, measured in results.items():
            lines.write(json.dumps({**asdict(cell), **asdict(measured)}) + "\n")
    print(f"{describe_processor()}; {arguments.steps} steps, {arguments.seeds} seeds; differences from the exact chain")
    print("\n".join(table(results, arguments)))
    exact = [m for cell, m in results.items() if cell.rounding == EXACT]
    return int(any(abs(m.survival - 1) > 1e-3 for m in exact))


def run(cell: Cell, steps: int, prose: corpus.Prose, folder: Path) -> Measured:
    """Fine-tune by a chain on weights stored as the cell says."""
    model = tiny_opt.load(folder).to(DTYPES[cell.dtype])
    exact = cell.rounding == EXACT
    if exact:
        model = model.float()
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    opt = ChainOptimizer(
        torch.optim.AdamW,
        model,
        EvenKnots(length=cell.links, total_steps=steps),
        link=LinkConfig(r=8),  # on query and value
        rounding="nearest" if exact else cell.rounding,
        seed=cell.seed,
        lr=cell.lr,
        weight_decay=0.0,
    )
    order = torch.Generator().manual_seed(cell.seed)
    batches = corpus.forever(prose.text["train"], tiny_opt.CONTEXT, BATCH, order)
    train(model, opt, [itertools.islice(batches, steps)], factor=lambda step, ties: 1.0)
    return measure(opt, model, before, prose)


def measure(
    opt: ChainOptimizer, model: torch.nn.Module, before: dict[str, torch.Tensor], prose: corpus.Prose
) -> Measured:
    """Compare the change of the weights with the sum of the links."""
    after = dict(model.named_parameters())
    inner = square = wrong = 0.0
    for layer in opt.chain.layers():
        asked = opt.chain.delta(layer)
        got = after[f"{layer}.weight"].detach().double() - before[f"{layer}.weight"]
        inner += (got * asked).sum().item()
        square += asked.square().sum().item()
        wrong += (got - asked).square().sum().item()
    sizes = [
        factor.norm() / before[f"{layer}.weight"].norm().item()
        for link in opt.chain
        for layer, factor in link.factors.items()
    ]
    bits = bits_per_byte(model.float(), prose.text["validation"], tiny_opt.CONTEXT)
    return Measured(bits, statistics.median(sizes), inner / square, (wrong / square) ** 0.5)


def table(results: dict[Cell, Measured], arguments: argparse.Namespace) -> list[str]:
    """A Markdown table: a row per storage, chain length, rate and rounding."""
    lines = [
        "| weights | links | rate | ‖ΔW‖/‖W‖ | rounding | Δ bits per byte (95 % CI) | survival | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int, float], None] = {(c.dtype, c.links, c.lr): None for c in results}
    for dtype, links, lr in groups:
        for rounding in ROUNDINGS:
            seeds = seeds_of(arguments)
            ours = [results[Cell(dtype, rounding, links, lr, s)] for s in seeds]
            exact = [results[Cell(dtype, EXACT, links, lr, s)] for s in seeds]
            mean = [statistics.mean(getattr(m, name) for m in ours) for name in ("bits", "size", "survival", "error")]
            if rounding == EXACT:
                shown = f"{mean[0]:.4f} itself"
            else:
                shown = stats.t_interval([a.bits - b.bits for a, b in zip(ours, exact)]).signed(4)
            lines.append(
                f"| {dtype} | {links} | {lr:g} | {mean[1]:.1e} | {rounding} | {shown} | {mean[2]:.3f} | {mean[3]:.3f} |"
            )
    return lines
