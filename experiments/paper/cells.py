"""One cell of the paper's experiments: model, task, method, learning rate, seed, sizes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from experiments.command_line import count
from experiments.methods import OUTSIDE_TRAINER, Method
from experiments.sweep import Outcome, RateSearch

DTYPES = ("float32", "bfloat16", "float16", "bf16-mixed")
"""The last two are mixed precision where a model is trained: fp32 weights, and arithmetic in 16 bits."""


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """The part of a cell that all cells of a table share.

    Attributes:
        dtype: of the weights; ``float16`` and ``bf16-mixed`` mean mixed precision: fp32 weights, 16-bit arithmetic.
        targets: names of the layers with adapters; empty for query and value.
        data_dir: folder of local JSONL files; None for the hub.
        max_length: tokens of a prompt with its answer.
        gradient_checkpointing: recompute activations in the backward pass.
        device_map: as for transformers; None for one device.
        fsdp: shard the model over the processes of `torchrun`.
    """

    dtype: str = "float32"
    targets: tuple[str, ...] = ()
    data_dir: str | None = None
    max_length: int = 2048
    gradient_checkpointing: bool = False
    device_map: str | None = None
    fsdp: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length}: at least 1 is needed")

    def circumstances(self) -> dict[str, Any]:
        """These attributes alone, by name."""
        return {field.name: getattr(self, field.name) for field in fields(Circumstances)}


@dataclass(frozen=True)
class Cell(Circumstances):
    """A complete description of one run; equal values are the same cell of a sweep.

    Attributes:
        model: ``"tiny"``, ``"smollm2"``, a folder or a hub name.
        task: a key of `experiments.tasks.TASKS`.
        method: LoRA, a chain, full fine-tuning, or prompting alone.
        lr: peak learning rate, falling linearly to zero; 0 for methods that train nothing.
        seed: of the data's sample and order, and of the adapters' draws.
        train: training examples.
        dev: development examples; None for the task's own number.
        test: test examples.
        epochs: passes over the training examples.
        batch: examples per optimizer step.
        bias: train the biases of the adapted layers too (the paper: OPT yes, Llama no).
    """

    model: str
    task: str
    method: Method
    lr: float
    seed: int
    train: int = 1000
    dev: int | None = None
    test: int = 1000
    epochs: int = 5
    batch: int = 8
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train", "test", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if self.dev is not None and self.dev < 1:
            raise ValueError(f"dev={self.dev}: at least 1 is needed")
        if self.method.kind in OUTSIDE_TRAINER:
            raise ValueError(
                f"method={self.method.kind!r} does not go through the Trainer: it is a method of the frontier"
            )
        if self.method.trains and not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr}: a method that trains needs a positive, finite learning rate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that set `Circumstances`, for every command that runs cells."""
    how = parser.add_argument_group("how")
    how.add_argument(
        "--data-dir", metavar="DIR", help="folder of <task>/train.jsonl and validation.jsonl (default: the hub)"
    )
    how.add_argument(
        "--targets", nargs="+", default=[], metavar="NAME", help="adapted layers (default: query and value)"
    )
    how.add_argument("--max-length", type=count, metavar="N",
                     help=f"tokens of a prompt with its answer (default: {Circumstances.max_length})")  # fmt: skip
    how.add_argument("--dtype", choices=DTYPES,
                     help="of the weights; float16 and bf16-mixed train fp32 weights in 16-bit arithmetic "
                     "(default: float16 on a GPU, else float32)")  # fmt: skip
    how.add_argument("--gradient-checkpointing", action="store_true", help="trade time for memory")
    how.add_argument("--device-map", metavar="MAP", help="as for transformers, such as auto (default: one device)")
    how.add_argument("--fsdp", action="store_true", help="shard the model over torchrun's processes (FSDP2)")


def circumstances(arguments: argparse.Namespace) -> dict[str, Any]:
    """The `Circumstances` that these options ask for, by name, without those left at their default."""
    given = {field.name: getattr(arguments, field.name) for field in fields(Circumstances)}
    given = {**given, "dtype": arguments.dtype or usual_dtype(), "targets": tuple(arguments.targets)}
    return {name: value for name, value in given.items() if value is not None}


def usual_dtype() -> str:
    """The default dtype: the protocol's mixed precision on a GPU, else fp32."""
    import torch

    return "float16" if torch.cuda.is_available() else "float32"


def name(cell: Cell) -> str:
    """Such as ``opt-1.3b-RTE-cola3-r8-lr0.001-seed0``."""
    rate = f"-lr{cell.lr:g}" if cell.method.trains else ""
    return f"{cell.model.rstrip('/').rpartition('/')[2]}-{cell.task}-{cell.method.name}{rate}-seed{cell.seed}"


def search(
    cell: Cell,
    rates: Sequence[float],
    seeds: Sequence[int],
    search_seeds: Sequence[int] | None = None,
    start: Sequence[float] = (),
) -> RateSearch[Cell]:
    """The runs of one table entry: a grid search on the development score, then every seed at the best rate.

    Args:
        cell: the run; its rate and seed are replaced.
        rates: the grid; ignored for methods that train nothing.
        seeds: of the comparison.
        search_seeds: the seeds over which a rate is judged; by default all, as in the paper.
        start: the rates to begin with; by default all.
    """
    return RateSearch(
        cell=lambda lr, seed: replace(cell, lr=lr, seed=seed),
        rates=tuple(sorted(set(rates))) if cell.method.trains else (0.0,),
        start=tuple(sorted(set(start or rates))) if cell.method.trains else (),
        search_seeds=tuple(seeds if search_seeds is None else search_seeds),
        seeds=tuple(seeds),
        loss=_loss,
    )


def _loss(outcome: Outcome) -> float:
    """The negative score; a run that diverged is worse than any."""
    return -outcome["dev"] if outcome.get("dev") is not None else math.inf
