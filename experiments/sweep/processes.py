"""The processes that run cells: their settings, how they begin and end, and what those of one `torchrun` agree on."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import Any


def processes() -> int:
    """How many processes `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def together() -> tuple[bool, Callable[[Any], Any]]:
    """Whether this is the first process of its `torchrun`, and a function that tells all what the first knows."""
    if processes() == 1:
        return True, lambda value: value
    import torch.distributed as dist
    from accelerate import PartialState

    PartialState()  # joins the processes, as the Trainer would a moment later

    def told(value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    return dist.get_rank() == 0, told


def settle() -> bool:
    """Settings of every process that runs cells, so that an outcome does not depend on which one ran it.

    Returns:
        Whether numbers below the normal range were flushed to zero before, for `unsettle`.
    """
    import torch

    before = bool(torch.tensor(1e-40) * 1 == 0)
    # numbers below fp32's normal range are a hundred times slower, and nothing depends on them
    torch.set_flush_denormal(True)
    gc.freeze()  # what is imported stays: Accelerate collects garbage with every model it prepares
    return before


def unsettle(flushed: bool) -> None:
    """Undo `settle` in a process that goes on to other things."""
    import torch

    torch.set_flush_denormal(flushed)
    gc.unfreeze()


def start(threads: int, gpus: Any) -> None:
    """Begin a process of a sweep's pool: its threads, and its GPU from a queue of them, if there is any."""
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    if gpus is not None:  # one each, before CUDA is looked at; of several, all would take the first
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    import torch

    torch.set_num_threads(threads)
    settle()


def _end_with_the_sweep() -> None:
    """A worker of a sweep that was killed would wait for its next cell for ever, with its memory and its GPU."""
    sweep = multiprocessing.parent_process()
    if sweep is not None:
        sweep.join()
        os._exit(1)
