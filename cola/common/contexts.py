"""Torch's ambient modes, which the library's own arithmetic must not depend on.

Default device and dtype are met where tensors are made: every such call says which it means.
"""

import contextlib
from collections.abc import Iterator

import torch

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off, under which a tie would multiply in bf16; usable as a decorator."""
    with contextlib.ExitStack() as stack:
        for device_type in _DEVICE_TYPES:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextlib.contextmanager
def unaffected() -> Iterator[None]:
    """Leave inference mode too, for tensors made there could not be trained later; usable as a decorator."""
    with without_autocast(), contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # this switches gradients on
            stack.enter_context(torch.no_grad())
        yield
