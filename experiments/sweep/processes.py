"""The processes that run cells: their settings, their end, and agreement within one `torchrun`."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import Any

from experiments.report.noise import without_noise


def processes() -> int:
    """How many processes `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def together() -> tuple[bool, Callable[[Any], Any]]:
    """Whether this is the first process of its `torchrun`, and a function that gives all the first one's value."""
    if processes() == 1:
        return True, lambda value: value
    import torch.distributed as dist
    from accelerate import PartialState

    PartialState()  # connects the processes, as the Trainer would later

    def told(value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    return dist.get_rank() == 0, told


def settle(threads: int | None = None) -> bool:
    """Set up a process that runs cells, so that outcomes do not depend on the process.

    Args:
        threads: of torch; None leaves them.

    Returns:
        Whether denormal numbers were flushed to zero before, for `unsettle`.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    before = bool(torch.tensor(1e-40) * 1 == 0)
    # denormal numbers are a hundred times slower, and nothing depends on them
    torch.set_flush_denormal(True)
    gc.freeze()  # skip imported modules: Accelerate collects garbage with every model it prepares
    return before


def unsettle(flushed: bool) -> None:
    """Undo `settle`."""
    import torch

    torch.set_flush_denormal(flushed)
    gc.unfreeze()


def start(threads: int, gpus: Any) -> None:
    """Begin a process of a sweep's pool: set its threads, and take its GPU from a queue if there are any."""
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    if gpus is not None:  # before CUDA starts; with several visible, all processes would take the first
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    settle(threads)
    without_noise()


def _end_with_the_sweep() -> None:
    """Exit when the sweep is killed; a worker would otherwise wait for ever, with its memory and its GPU."""
    sweep = multiprocessing.parent_process()
    if sweep is not None:
        sweep.join()
        os._exit(1)
