"""Makes a Trainer's checkpoints work with a running chain: its ``checkpoint-N/chain`` can replace missing state."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from cola import Chain, ChainOptimizer
from cola.chain.on_disk import CHECKPOINT
from cola.checkpoint.directory import read_run
from cola.checkpoint.restore import restore_rng

logger = logging.getLogger("cola")

#: the chain's directory in a checkpoint, and finally in the output directory
CHAIN_DIR = "chain"


def watch_checkpoints(trainer: Any, opt: ChainOptimizer) -> None:
    """Let the chain take part when ``trainer`` writes and reads checkpoints.

    A checkpoint without the optimizer's state (``save_only_model=True``, or a file is missing) does not say that its
    weights include a live link. Its ``chain`` directory is loaded instead, over the untouched model; without one the
    checkpoint is refused before training begins.
    """
    save, load_model = trainer._save_checkpoint, trainer._load_from_checkpoint
    load_optimizer, load_random = trainer._load_optimizer_and_scheduler, trainer._load_rng_state

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        opt.live.note.in_checkpoint = True
        try:
            save(*args, **kwargs)
        finally:
            opt.live.note.in_checkpoint = False

    def load_from_checkpoint(directory: str, model: Any = None) -> None:
        if _replacement(trainer, directory) is None:
            load_model(directory, model)

    def load_optimizer_and_scheduler(directory: str | None) -> None:
        chain = None if directory is None else _replacement(trainer, directory)
        if directory is None or chain is None:
            load_optimizer(directory)
            if directory is not None:
                _bring_the_links(opt, Path(directory) / CHAIN_DIR)
            return
        opt.load(chain, rng=False)
        _forward(trainer.lr_scheduler, opt, Path(directory) / "scheduler.pt")
        logger.warning("%s has no optimizer state: training goes on from %s", directory, chain)

    def load_rng_state(directory: str | None) -> None:
        load_random(directory)
        if directory is None or trainer.args.world_size > 1 or os.path.isfile(os.path.join(directory, "rng_state.pth")):
            return
        chain = Path(directory) / CHAIN_DIR
        if (chain / CHECKPOINT[0]).is_file():
            restore_rng(read_run(chain).rng)

    trainer._save_checkpoint, trainer._load_from_checkpoint = save_checkpoint, load_from_checkpoint
    trainer._load_optimizer_and_scheduler, trainer._load_rng_state = load_optimizer_and_scheduler, load_rng_state


def _replacement(trainer: Any, directory: str) -> Path | None:
    """The chain to load instead of a checkpoint's weights; None if the optimizer's state is there.

    Raises:
        ValueError: neither is there, or the checkpoint was cut off while it was written.
    """
    if not os.path.isdir(directory):
        return None  # the trainer raises
    names = os.listdir(directory)
    if "trainer_state.json" not in names:  # the Trainer writes it last
        raise ValueError(
            f"resume_from_checkpoint={directory!r}: the checkpoint is not whole, it has no trainer_state.json (the run "
            "was stopped while writing it). Remove it, and resume from the one before"
        )
    states = [
        name
        for name in names
        if name in ("optimizer.pt", "optimizer.bin")
        or ("optimizer" in name and os.path.isdir(os.path.join(directory, name)))
    ]
    if states and "scheduler.pt" in names:
        return None
    chain = Path(directory) / CHAIN_DIR
    if not trainer.is_fsdp_enabled and (chain / CHECKPOINT[0]).is_file():
        return chain
    lacks = "a scheduler's state" if states else "an optimizer's state"
    raise ValueError(
        f"resume_from_checkpoint={directory!r}: the checkpoint lacks {lacks}, and {chain} is no checkpoint of a chain. "
        "The weights alone do not say which links are tied and which is live, so the chain cannot continue from them. "
        "Save with save_only_model=False, or (not under FSDP) with attach(..., save_chain=True)"
    )


def _bring_the_links(opt: ChainOptimizer, links: Path) -> None:
    """Load the links, which FSDP drops from the optimizer's state, from their own directory."""
    if opt.chain.missing and links.is_dir():
        opt.chain._restore(Chain.load(links)._ledger())


def _forward(scheduler: Any, opt: ChainOptimizer, saved: Path) -> None:
    """Bring a new scheduler to the step that ``opt`` has reached."""
    if saved.is_file():
        scheduler.load_state_dict(torch.load(saved, weights_only=True))
    elif isinstance(scheduler, LambdaLR):  # nearly all of transformers' schedulers; they depend on the step alone
        rates = [group["lr"] for group in opt.param_groups]
        at = {"last_epoch": opt.steps, "_step_count": opt.steps + 1, "_last_lr": rates}
        scheduler.load_state_dict({**scheduler.state_dict(), **at})
    else:
        logger.warning("the checkpoint lacks scheduler.pt: %s starts anew", type(scheduler).__name__)
