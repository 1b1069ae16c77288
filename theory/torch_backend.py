"""Completion over observed entries on torch tensors, so that it runs on a GPU.

`on_torch(problem, device)` is the twin of an `ObservedCompletion` whose observed entries, gradients, atoms
and Lanczos vectors live on a device; algorithm, iterate and loss are the same code. Only scalars, the small
bidiagonal matrix and the random start cross to the CPU. The start is drawn there, so a run on any device
follows the NumPy run up to rounding.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theory.iterates import Pattern, Vertex
from theory.problems.recovery import ObservedCompletion


class TorchPattern(Pattern):
    """An observed set with its index arrays on a device.

    Args:
        pattern: the NumPy one. device: in torch's terms.
    """

    def __init__(self, pattern: Pattern, device: torch.device):
        self.device, self.shape = device, pattern.shape
        for name in ("rows", "cols", "indptr", "by_column", "row_of_column", "column_indptr"):
            setattr(self, name, torch.from_numpy(getattr(pattern, name)).to(device))

    def entries(self, V: Vertex) -> Any:
        """The entries of a low-rank vertex on the observed set."""
        if isinstance(V, np.ndarray):
            raise ValueError("V must be a LowRank vertex, got ndarray: the device holds nothing dense")
        return super().entries(V)

    def native(self, array: Any, dtype: Any) -> Tensor:
        """An array as a tensor on the device."""
        tensor = array if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(device=self.device, dtype=getattr(torch, np.dtype(dtype).name))

    def take(self, vector: Any, index: Any) -> Tensor:
        """The indexed entries of a tensor."""
        return vector[index]

    def compressed(self, values: Any, columns: Any, indptr: Any, shape: tuple[int, int]) -> Tensor:
        """A tensor in torch's compressed-row format."""
        # the pattern has validated its indices; checking them again would cost a pass per gradient
        return torch.sparse_csr_tensor(indptr, columns, values, size=shape, check_invariants=False)

    def to_numpy(self, matrix: Any) -> np.ndarray:
        """A tensor, dense or sparse, as a NumPy array."""
        return matrix.to_dense().cpu().numpy()


def on_torch(problem: ObservedCompletion, device: str | torch.device = "cuda") -> ObservedCompletion:
    """The twin of a problem on a torch device.

    Args:
        problem: from `theory.problems.recovery.observed_completion`, or your own.
        device: such as ``"cuda"`` or ``"cpu"``.

    Raises:
        ValueError: torch cannot use the device here.

    Example:
        >>> from theory.frank_wolfe import frank_wolfe
        >>> from theory.problems.recovery import observed_completion
        >>> problem = observed_completion(40, 30, 300)
        >>> here, there = (frank_wolfe(p, 20, snapshots=0) for p in (problem, on_torch(problem, "cpu")))
        >>> bool(abs(here.average / there.average - 1) < 1e-9)
        True
    """
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"device must be one that torch can use here, got {device!r} ({first})") from error
    twin = copy(problem)
    twin.name, twin.pattern = f"{problem.name} on {place}", TorchPattern(problem.pattern, place)
    twin.y = twin.pattern.native(problem.y, problem.dtype)
    return twin
