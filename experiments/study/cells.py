"""One cell of the offline study: fine-tune a small language model on text, next token, by one method."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from cola import KnotError
from experiments.methods import Method
from experiments.study import text
from experiments.study.training import WarmDecay, train
from experiments.sweep.sweep import Outcome, Sweep
from experiments.tiny import tiny_opt
from experiments.tiny.loss import held_out_loss

TINY = "tiny"
"""The name of the repository's own model; any other is a folder or a hub name."""
WEIGHTS = "weights.safetensors"
TARGETS: dict[str, Any] = {"qv": ["q_proj", "v_proj"], "all-linear": "all-linear"}


@dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share.

    Attributes:
        model: `TINY`, a folder or a hub name.
        corpus: `text.PROSE`, or a text file.
        targets: a key of `TARGETS`: the layers that get adapters.
        epochs: passes over the training blocks, the same for every arm.
        train: training blocks.
        held_out: blocks per held-out split.
        length: tokens per block.
        batch: blocks per optimizer step.
    """

    model: str = TINY
    corpus: str = text.PROSE
    targets: str = "qv"
    epochs: int = 5
    train: int = 160
    held_out: int = 96
    length: int = tiny_opt.CONTEXT
    batch: int = 4

    def __post_init__(self) -> None:
        if self.targets not in TARGETS:
            raise ValueError(f"targets={self.targets!r} is unknown: choose one of {', '.join(TARGETS)}")
        for name in ("epochs", "train", "held_out", "length", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")

    @property
    def unit(self) -> str:
        """What losses are printed in."""
        return "bits per byte" if self.model == TINY else "nats per token"

    @property
    def per_nat(self) -> float:
        """How many of these units a nat per token is."""
        return 1 / math.log(2) if self.model == TINY else 1.0

    def blocks(self) -> text.Blocks:
        """The corpus, cut."""
        tokenizer = None if self.model == TINY else self.model
        return text.blocks(self.corpus, tokenizer, self.length, self.train, self.held_out)


@dataclass(frozen=True)
class StudyCell:
    """One run: ``split="dev"`` trains and keeps the merged weights, ``"test"`` evaluates those kept."""

    setting: Setting
    method: Method
    lr: float
    seed: int
    split: str = "dev"

    @property
    def tested(self) -> StudyCell:
        """The cell that evaluates this one's weights on the test split."""
        return replace(self, split="test")

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of this run, over ``model``.

        Raises:
            ValueError: the model cannot carry the method, or the epochs cannot.
        """
        return self.method.optimizer(
            model,
            lr=self.lr,
            seed=self.seed,
            epochs=self.setting.epochs,
            steps_per_epoch=math.ceil(len(self.setting.blocks().train) / self.setting.batch),
            targets=TARGETS[self.setting.targets],
        )


def name(cell: StudyCell) -> str:
    """Such as ``cola3-r8-lr0.004-seed0-dev``."""
    return f"{cell.method.name}-{cell.setting.targets}-lr{cell.lr:g}-seed{cell.seed}-{cell.split}"


def run(cell: StudyCell, folder: Path) -> Outcome:
    """Train, or test what was trained; see `StudyCell`.

    Returns:
        For ``"dev"``: ``dev`` (held-out loss of the final weights, nats per token), ``dev_by_epoch``, ``losses``
        (training, per step), ``knots`` (step, rank, norm), ``parameters``; or ``diverged``, the reason. For ``"test"``:
        ``test``; or ``diverged``, as in training.
    """
    tiny_opt.quiet()
    model = load(cell.setting.model)
    if cell.split == "test":
        sweep, trained = Sweep(folder.parent.parent, run, name), replace(cell, split="dev")
        found = sweep.read(trained)
        if found is not None and "diverged" in found:
            return found
        load_model(model, str(sweep.place(trained) / WEIGHTS))
        return {"test": held_out_loss(model, cell.setting.blocks().test)}
    try:
        outcome = fine_tune(model, cell)
    except (FloatingPointError, KnotError) as error:
        return {"diverged": str(error)}
    save_model(model, str(folder / WEIGHTS))
    return outcome


def load(model: str) -> nn.Module:
    """The untouched model, fp32."""
    if model == TINY:
        return tiny_opt.load()
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.config.use_cache = False
    return loaded


def fine_tune(model: nn.Module, cell: StudyCell) -> Outcome:
    """Fine-tune in place: shuffled epochs, the rate falling linearly to zero over the run, as in the paper.

    Raises:
        FloatingPointError: the loss is not finite.
        KnotError: a link is not.
    """
    setting = cell.setting
    blocks = setting.blocks()
    epochs = setting.epochs
    total = epochs * math.ceil(len(blocks.train) / setting.batch)
    order = torch.Generator().manual_seed(cell.seed)
    by_epoch: list[float] = []
    trained = train(
        model,
        cell.optimizer(model),
        (blocks.train[torch.randperm(len(blocks.train), generator=order)].split(setting.batch) for _ in range(epochs)),
        WarmDecay(total),
        between=lambda: by_epoch.append(held_out_loss(model, blocks.dev)),
    )
    by_epoch.append(held_out_loss(model, blocks.dev))
    if not math.isfinite(by_epoch[-1]):
        raise FloatingPointError(f"the held-out loss is {by_epoch[-1]}")
    return {
        "dev": by_epoch[-1],
        "dev_by_epoch": by_epoch,
        "losses": [float(f"{loss:.6g}") for loss in trained.losses],
        "knots": [{"step": k.step, "rank": k.rank, "norm": k.delta_norm} for k in trained.knots if k.step < total],
        "parameters": trained.parameters,
    }
