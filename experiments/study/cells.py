"""One cell of a comparison: fine-tune a small language model on text by one method, or test the weights it left."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from cola import Chain, ChainOptimizer, KnotError
from experiments.methods import Method
from experiments.study.planted import Planted
from experiments.study.setting import Setting
from experiments.study.training import train
from experiments.sweep import Outcome, Sweep
from experiments.tiny import tiny_opt
from experiments.tiny.loss import held_out_loss

WEIGHTS = "weights.safetensors"
CHAIN = "chain"


@dataclass(frozen=True)
class StudyCell:
    """One run: ``split="dev"`` trains and keeps the merged weights, ``"test"`` evaluates them.

    A method that trains nothing has only the test, of the untouched model.
    """

    setting: Setting | Planted
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
            ValueError: the method does not fit the model, or has more links than the run has epochs.
        """
        targets = self.setting.targets
        return self.method.optimizer(
            model,
            lr=self.lr,
            seed=self.seed,
            epochs=self.setting.epochs,
            steps_per_epoch=self.setting.steps_per_epoch(),
            targets="all-linear" if targets == ("all-linear",) else list(targets),
        )


def name(cell: StudyCell) -> str:
    """Such as ``cola3-r8-qv-lr0.004-seed0-dev``."""
    targets = "qv" if cell.setting.targets == Setting.targets else "-".join(cell.setting.targets)
    return f"{cell.method.name}-{targets}-lr{cell.lr:g}-seed{cell.seed}-{cell.split}"


def needs(cell: StudyCell) -> list[StudyCell]:
    """The training run whose weights a test reads."""
    return [replace(cell, split="dev")] if cell.split == "test" and cell.method.trains else []


def run(cell: StudyCell, folder: Path) -> Outcome:
    """Train, or test the weights of the training cell; see `StudyCell`. Losses are in nats per token.

    Returns:
        For ``"dev"``: the outcome of `fine_tune`, or ``diverged``, the reason. For ``"test"``: ``test`` and, where
        chains are kept, ``rebuilt``, the largest difference between the weights and the untouched model with the chain
        applied (None without a chain); or ``diverged``, as in training.
    """
    tiny_opt.quiet()
    _without_repeats()
    model = cell.setting.load()
    if cell.split == "test":
        return _test(cell, model, folder)
    try:
        outcome = fine_tune(model, cell, folder)
    except (FloatingPointError, KnotError) as error:
        return {"diverged": str(error)}
    save_model(model, str(folder / WEIGHTS))
    return outcome


def _without_repeats() -> None:
    """Leave out the warning of a large link, which every run of a sweep would repeat; outcomes have their size."""
    logger = logging.getLogger("cola")
    if _is_new not in logger.filters:
        logger.addFilter(_is_new)


def _is_new(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("link %d changed layer")


def fine_tune(model: nn.Module, cell: StudyCell, folder: Path | None = None) -> Outcome:
    """Fine-tune in place.

    Args:
        model: untouched.
        cell: the run.
        folder: where the chain goes, if the setting keeps chains.

    Returns:
        ``dev`` (held-out loss of the final weights), ``dev_by_epoch``, ``losses`` (training, one per step), ``knots``
        (step, rank, norm, the norm lost to rounding, the largest share ‖ΔW‖/‖W‖ of a layer; the last is the tie that
        ends the run), ``parameters`` (trainable at once), ``state_bytes`` (see `memory.trained_bytes`), and ``seconds``
        and ``cpu_seconds`` of the training.

    Raises:
        FloatingPointError: a loss is not finite.
        KnotError: a link is not finite.
    """
    setting, by_epoch = cell.setting, list[float]()
    started, cpu_started = time.perf_counter(), time.process_time()
    optimizer = cell.optimizer(model)

    def measure() -> None:
        by_epoch.append(held_out_loss(model, setting.blocks().dev))

    between = measure if setting.by_epoch else lambda: None
    trained = train(model, optimizer, setting.read(cell.seed), setting.schedule(), between=between)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    measure()
    if not math.isfinite(by_epoch[-1]):
        raise FloatingPointError(f"the held-out loss is {by_epoch[-1]}")
    if setting.keep_chains and folder is not None and isinstance(optimizer, ChainOptimizer):
        optimizer.chain.save(folder / CHAIN)
    return {
        "dev": by_epoch[-1],
        "dev_by_epoch": by_epoch,
        "losses": trained.losses,
        "knots": [
            {"step": k.step, "rank": k.rank, "norm": k.delta_norm, "norm_lost": k.lost_norm, "share": k.share}
            for k in trained.knots
        ],
        "parameters": trained.parameters,
        "state_bytes": trained.state_bytes,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def _test(cell: StudyCell, model: nn.Module, folder: Path) -> Outcome:
    rebuilt = None
    if cell.method.trains:
        (trained,), sweep = needs(cell), Sweep(folder.parent.parent, run, name)
        found = sweep.read(trained)
        if found is not None and "diverged" in found:
            return found
        kept = sweep.place(trained)
        load_model(model, str(kept / WEIGHTS))
        if cell.setting.keep_chains and cell.method.adapts:
            rebuilt = _difference(model, kept / CHAIN, cell.setting)
    loss = held_out_loss(model, cell.setting.blocks().test)
    return {"test": loss, "rebuilt": rebuilt} if cell.setting.keep_chains else {"test": loss}


def _difference(tuned: nn.Module, chain: Path, setting: Setting | Planted) -> float:
    rebuilt = setting.load()
    Chain.load(chain).apply(rebuilt)
    weights = dict(tuned.named_parameters())
    return max((weights[name] - value).abs().max().item() for name, value in rebuilt.named_parameters())
