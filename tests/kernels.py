"""Counts what a call computes."""

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {"t", "view", "slice", "select", "detach", "alias", "as_strided", "unsqueeze", "expand", "transpose", "reshape",
         "_unsafe_view", "split", "unbind"}  # fmt: skip


class Kernels(TorchDispatchMode):
    """Counts what is computed, by name; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name not in VIEWS:
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def kernels(run):
    with Kernels() as seen:
        run()
    return seen.counts
