"""Torch's ambient modes, and how the library's own arithmetic is kept independent of them.

The default device and dtype need no context: every call that creates a tensor names its own.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.autograd import forward_ad

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Switch off autocast, which would make a tie multiply in bf16; usable as a decorator."""
    with contextlib.ExitStack() as stack:
        for device_type in _DEVICE_TYPES:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextlib.contextmanager
def unaffected() -> Iterator[None]:
    """Leave inference mode too, because its tensors cannot be trained later; usable as a decorator."""
    with without_autocast(), contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # this switches gradients on
            stack.enter_context(torch.no_grad())
        yield


def transformed() -> bool:
    """Whether `torch.func` or forward-mode AD is active, for which the library's autograd functions have no rule."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
