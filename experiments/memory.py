"""The memory of training: bytes of trained state, and the peak of a process or of a GPU."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from cola import AdaptedLayer, ChainOptimizer


def trained_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of the trained parameters, their gradients, the optimizer state, and the frozen factors of a live link.

    This is what training needs, and a base model that is only read does not. Call it after a step and before
    `zero_grad`.
    """
    different = {id(tensor): tensor for tensor in _kept(optimizer)}  # holding them keeps their ids different
    return sum(tensor.numel() * tensor.element_size() for tensor in different.values())


def _kept(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor):
                    yield value
                elif hasattr(value, "ortho_matrix"):  # GaLore's projector
                    yield value.ortho_matrix
    if isinstance(optimizer, ChainOptimizer):
        for layer in optimizer.live.layers.values():
            assert isinstance(layer, AdaptedLayer)
            yield from (getattr(layer, name) for name in layer.entries)


def peak_memory(run: Callable[[], object], device: torch.device | str = "cpu") -> tuple[int, int]:
    """The memory in use before ``run``, and its peak in ``run``, both in bytes.

    On a GPU it is what torch has allocated there. Else it is the resident memory of this process, libraries included.
    Where the system cannot restart its record of the peak (Linux can), the peak is that of the process so far.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return before, torch.cuda.max_memory_allocated(device)
    before = psutil.Process().memory_info().rss
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    run()
    return before, _resident_peak()


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the peak of the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # psutil knows the present use, not the peak

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
