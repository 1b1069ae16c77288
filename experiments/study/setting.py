"""The setting of a comparison: everything that its arms share, from the model and the text to the schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from experiments import models
from experiments.methods import QUERY_AND_VALUE
from experiments.study import text
from experiments.study.training import WarmDecay
from experiments.tiny import corpus, tiny_opt

_OPTIONS = {"context": "length", "batch_size": "batch", "train_bytes": "bytes", "held_out": "held-out"}


@dataclass(frozen=True)
class Setting:
    """The part of a run that all arms of a comparison share. The defaults are the study's.

    Attributes:
        model: ``"tiny"``, ``"tiny-prose"``, a folder or a hub name.
        corpus: `text.PROSE`, `text.CODE` or the path of a text file.
        targets: names of the layers that get adapters, or ``("all-linear",)``.
        epochs: passes over the training text, the same for every arm.
        train: number of training blocks; unused with ``train_bytes``.
        held_out: number of blocks per held-out split; None for whole splits.
        context: tokens per block.
        batch_size: blocks per optimizer step.
        train_bytes: bytes of training text, in pieces spread evenly over it, which every epoch cuts into blocks at a
            new offset; None for ``train`` blocks that are cut once. It takes a model over bytes.
        warmup: steps over which the rate rises, at the start and again after every knot.
        decay: share of the run, at its end, over which the rate falls to zero.
        by_epoch: measure the development loss after every epoch, not only at the end.
        keep_chains: save every chain, and check that it rebuilds the weights.

    Raises:
        ValueError: a number out of range; the message names the option of the command.
    """

    model: str = models.TINY
    corpus: str = text.PROSE
    targets: tuple[str, ...] = QUERY_AND_VALUE
    epochs: int = 5
    train: int = 160
    held_out: int | None = 96
    context: int = tiny_opt.CONTEXT
    batch_size: int = 4
    train_bytes: int | None = None
    warmup: int = 0
    decay: float = 1.0
    by_epoch: bool = True
    keep_chains: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "train", "held_out", "context", "batch_size", "train_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{_OPTIONS.get(name, name)}={value}: at least 1 is needed")
        if self.warmup < 0:
            raise ValueError(f"--warmup={self.warmup}: a number of steps, 0 for none")
        if not 0 < self.decay <= 1:
            raise ValueError(f"--decay={self.decay}: a share of the run, above 0 and at most 1")

    @property
    def over_bytes(self) -> bool:
        """Whether a token is a byte."""
        return self.train_bytes is not None or models.over_bytes(self.model)

    @property
    def unit(self) -> str:
        """The unit in which losses are printed."""
        return "bits per byte" if self.over_bytes else "nats per token"

    @property
    def per_nat(self) -> float:
        """How many of these units a nat per token is."""
        return 1 / math.log(2) if self.over_bytes else 1.0

    def load(self) -> nn.Module:
        """The untouched model, in fp32 on the CPU.

        Raises:
            OSError: there is no such text or model.
            ValueError: a block is longer than the model reads.
        """
        text.require(self.corpus)
        models.require(self.model)
        if self.over_bytes:
            model: Any = tiny_opt.load(models.folder(self.model))
        else:
            model, _ = models.load(self.model, device="cpu")
            model.config.use_cache = False
        longest = getattr(model.config, "max_position_embeddings", math.inf) - self.over_bytes  # BOS opens a block
        if self.context > longest:
            raise ValueError(f"--length={self.context}: the model reads at most {longest} tokens per block")
        return model

    def blocks(self) -> text.Blocks:
        """The corpus, cut into blocks."""
        tokenizer_of = None if self.over_bytes else str(models.folder(self.model))
        return text.blocks(self.corpus, tokenizer_of, self.context, self.train, self.held_out)

    def training_text(self) -> bytes:
        """The ``train_bytes`` of the training text that are used."""
        return corpus.thin(text.splits(self.corpus)["train"], self.train_bytes or 0)

    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        if self.train_bytes is None:
            return math.ceil(len(self.blocks().train) / self.batch_size)
        return corpus.batches_per_epoch(self.training_text(), self.context, self.batch_size)

    def steps(self) -> int:
        """Optimizer steps in a run."""
        return self.epochs * self.steps_per_epoch()

    def schedule(self) -> WarmDecay:
        """The factor on the learning rate."""
        return WarmDecay(self.steps(), self.warmup, self.decay)

    def read(self, seed: int) -> Iterator[Iterable[torch.Tensor]]:
        """The shuffled batches of every epoch, the same for all arms of a seed."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            if self.train_bytes is None:
                blocks = self.blocks().train
                yield blocks[torch.randperm(len(blocks), generator=generator)].split(self.batch_size)
            else:
                yield corpus.epoch(self.training_text(), self.context, self.batch_size, generator)
