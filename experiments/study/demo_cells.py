"""One cell of the demo: fine-tune the tiny OPT to prose by one method, or test what came of it.

The loop, the methods and the sweep are the study's. What differs is the demo's own: text in bytes that every epoch cuts
elsewhere, a rate that stays flat and rises anew after knots, whole held-out splits, and a chain that is kept and
checked.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from cola import Chain, ChainOptimizer, KnotError
from experiments.methods import Method
from experiments.study.training import WarmDecay, train
from experiments.sweep.sweep import Outcome, Sweep
from experiments.tiny import corpus, tiny_opt
from experiments.tiny.loss import bits_per_byte

WEIGHTS = "weights.safetensors"
CHAIN = "chain"


@functools.cache
def prose() -> corpus.Prose:
    """The text, read once per process."""
    return corpus.prose()


@dataclass(frozen=True)
class Setting:
    """What all arms of the demo share.

    Attributes:
        model: folder of the untouched model.
        epochs: passes over the training text, the same for every arm.
        train_bytes: how much of the training split is used, in pieces spread evenly over it.
        context: bytes per block.
        batch_size: blocks per optimizer step.
        warmup: steps over which the rate rises, at the start and again after every knot.
        decay: share of the run, at its end, over which the rate falls to zero.
        targets: names of the layers that get adapters, or `("all-linear",)`.
        init: how A is drawn, as in `cola.LinkConfig`.
    """

    model: str = str(tiny_opt.COMMITTED)
    epochs: int = 3
    train_bytes: int = 36_864
    context: int = 256
    batch_size: int = 2
    warmup: int = 15
    decay: float = 0.5
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    init: str = "gaussian"

    def training_text(self) -> bytes:
        """The part of the training split that is used."""
        return corpus.thin(prose().text["train"], self.train_bytes)

    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return corpus.batches_per_epoch(self.training_text(), self.context, self.batch_size)

    def steps(self) -> int:
        """Optimizer steps in a run."""
        return self.epochs * self.steps_per_epoch()

    def schedule(self) -> WarmDecay:
        """The factor on the learning rate."""
        return WarmDecay(self.steps(), self.warmup, self.decay)

    def read(self, seed: int) -> Iterator[Iterator[torch.Tensor]]:
        """The epochs' batches, the same for every arm of a seed."""
        generator, text = torch.Generator().manual_seed(seed), self.training_text()
        for _ in range(self.epochs):
            yield corpus.epoch(text, self.context, self.batch_size, generator)

    def bits(self, model: nn.Module, split: str) -> float:
        """Bits per byte of a whole split."""
        return bits_per_byte(model, prose().text[split], self.context)


@dataclass(frozen=True)
class DemoCell:
    """One run: ``split="validation"`` trains and keeps weights and chain, ``"test"`` evaluates those.

    A method that trains nothing has the untouched model's test alone.
    """

    setting: Setting
    method: Method
    lr: float
    seed: int
    split: str = "validation"

    @property
    def tested(self) -> DemoCell:
        """The cell that evaluates this one's weights on the test split."""
        return replace(self, split="test")

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of this run, over ``model``."""
        targets = self.setting.targets
        return self.method.optimizer(
            model,
            lr=self.lr,
            seed=self.seed,
            epochs=self.setting.epochs,
            steps_per_epoch=self.setting.steps_per_epoch(),
            targets="all-linear" if targets == ("all-linear",) else list(targets),
            init=self.setting.init,
        )


def name(cell: DemoCell) -> str:
    """Such as ``cola-even-2-r8-lr0.004-seed0-validation``."""
    return f"{cell.method.name}-lr{cell.lr:g}-seed{cell.seed}-{cell.split}"


def run(cell: DemoCell, folder: Path) -> Outcome:
    """Train, or test what was trained; see `DemoCell`. Losses are in bits per byte, times in seconds.

    Returns:
        For ``"validation"``: ``validation``, ``losses`` (training, per step), ``knots`` (step, rank, norm, the norm
        lost to rounding; the last tie is the end's), ``parameters``, and of the training ``seconds`` and
        ``cpu_seconds``. For ``"test"``: ``test`` and ``rebuilt``, the largest difference between the weights and the
        untouched model with the chain applied, None without a chain.

    Raises:
        FloatingPointError: a training loss or a link is not finite; the message names the run.
    """
    tiny_opt.quiet()
    model = tiny_opt.load(Path(cell.setting.model))
    if cell.split == "test":
        rebuilt = None
        if cell.method.trains:
            kept = Sweep(folder.parent.parent, run, name).place(replace(cell, split="validation"))
            load_model(model, str(kept / WEIGHTS))
            rebuilt = _difference(model, kept / CHAIN, cell) if cell.method.adapts else None
        return {"test": cell.setting.bits(model, "test"), "rebuilt": rebuilt}
    started, cpu_started = time.perf_counter(), time.process_time()
    optimizer = cell.optimizer(model)
    try:
        trained = train(model, optimizer, cell.setting.read(cell.seed), cell.setting.schedule())
    except (FloatingPointError, KnotError) as error:
        raise FloatingPointError(f"{cell.method.name}, lr={cell.lr:g}, seed={cell.seed}: {error}") from error
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    if isinstance(optimizer, ChainOptimizer):
        optimizer.chain.save(folder / CHAIN)
    save_model(model, str(folder / WEIGHTS))
    return {
        "validation": cell.setting.bits(model, "validation"),
        "losses": [loss / math.log(2) for loss in trained.losses],
        "knots": [
            {"step": k.step, "rank": k.rank, "norm": k.delta_norm, "norm_lost": k.lost_norm} for k in trained.knots
        ],
        "parameters": trained.parameters,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def _difference(tuned: nn.Module, chain: Path, cell: DemoCell) -> float:
    rebuilt = tiny_opt.load(Path(cell.setting.model))
    Chain.load(chain).apply(rebuilt)
    left = dict(tuned.named_parameters())
    return max((left[name] - value).abs().max().item() for name, value in rebuilt.named_parameters())
