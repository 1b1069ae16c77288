"""Completion over observed entries on torch tensors, so that a GPU can hold them; the algorithm stays the
same file.

`on_torch(problem, device)` gives the twin of an `ObservedCompletion` whose observed entries, gradients, atoms and
Lanczos vectors live on a device. Only scalars, the small bidiagonal matrix and the random start cross to the CPU,
and the start is drawn there, so that a run on any device follows the NumPy run up to rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from theory.iterates import Gradient, LowRank, ObservedMatrix, ObservedPoint, Pattern, Point, Vertex
from theory.problems.recovery import ObservedCompletion

DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}


class TorchPattern(Pattern):
    """The observed set with its index arrays on a device.

    Args:
        pattern: the NumPy one. device: as torch names it.
    """

    def __init__(self, pattern: Pattern, device: torch.device):
        self.device, self.shape, self.size = device, pattern.shape, len(pattern)
        for name in ("rows", "cols", "indptr", "by_column", "row_of_column", "column_indptr"):
            setattr(self, name, torch.from_numpy(getattr(pattern, name)).to(device))

    def __len__(self) -> int:
        return self.size

    def entries(self, V: Vertex) -> Any:
        """The entries of a low-rank vertex on the observed set."""
        if not isinstance(V, LowRank):
            raise ValueError(f"V must be a LowRank vertex, got {type(V).__name__}: nothing dense lives on the device")
        columns = range(V.left.shape[1])
        return sum(V.left[:, k][self.rows] * V.right[k][self.cols] for k in columns)

    def zeros(self, dtype: Any) -> Any:
        """One zero per observed entry, on the device."""
        return torch.zeros(self.size, dtype=DTYPES[np.dtype(dtype)], device=self.device)

    def native(self, array: Any, dtype: Any) -> Any:
        """An array as a tensor on the device."""
        tensor = array if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(device=self.device, dtype=DTYPES[np.dtype(dtype)])

    def matrix(self, values: Any) -> ObservedMatrix:
        """The matrix with these observed entries."""
        return TorchObservedMatrix(self, values)


class TorchObservedMatrix(ObservedMatrix):
    """An `ObservedMatrix` in torch's compressed-row format, both orientations."""

    def __init__(self, pattern: TorchPattern, values: Any):
        self.pattern, self.values = pattern, values
        m, n = pattern.shape
        self.by_rows = _csr(pattern.indptr, pattern.cols, values, (m, n))
        self.by_columns = _csr(pattern.column_indptr, pattern.row_of_column, values[pattern.by_column], (n, m))

    @property
    def dtype(self) -> np.dtype:
        """The element type, as NumPy names it."""
        return np.dtype(str(self.values.dtype).removeprefix("torch."))

    def toarray(self) -> np.ndarray:
        """The matrix as a dense NumPy array; for small checks."""
        return self.by_rows.to_dense().cpu().numpy()


def _csr(indptr: Any, columns: Any, values: Any, shape: tuple[int, int]) -> Any:
    # the indices were validated when the pattern was made; checking them again would cost a pass per gradient
    return torch.sparse_csr_tensor(indptr, columns, values, size=shape, check_invariants=False)


class TorchPoint(ObservedPoint):
    """The iterate on the device."""

    def dense(self) -> np.ndarray:
        """The whole matrix as a NumPy array; for small checks."""
        out = np.zeros(self.pattern.shape)
        for weight, left, right in zip(self.weights, self.lefts, self.rights):
            out += weight * (left @ right).cpu().numpy()
        return out

    def copy(self) -> TorchPoint:
        """A copy that shares the atoms."""
        twin = TorchPoint(self.pattern, self.dtype)
        values: Any = self.values
        twin._norm2, twin.values = self._norm2, values.clone()
        twin.weights, twin.lefts, twin.rights = self.weights.copy(), list(self.lefts), list(self.rights)
        return twin


class TorchCompletion(ObservedCompletion):
    """`ObservedCompletion` on a device; made by `on_torch`."""

    def __init__(self, problem: ObservedCompletion, device: torch.device):
        self.name, self.oracle, self.dtype = f"{problem.name} on {device}", problem.oracle, problem.dtype
        self.beta, self.M, self.magnitude = problem.beta, problem.M, problem.magnitude
        self.pattern = TorchPattern(problem.pattern, device)
        self.y = self.pattern.native(problem.y, problem.dtype)

    def start(self) -> Point:
        """Zero, with no atoms."""
        return TorchPoint(self.pattern, self.dtype)

    def evaluate(self, W: Point) -> tuple[float, Gradient]:
        """Loss and gradient on the observed set; the mean runs in float64."""
        r: Any = self._residual(W)
        q = 1 / (1 + r * r)
        value = 1 - float(q.mean(dtype=torch.float64))
        return value, self.pattern.matrix(r * q * q * (2 / r.numel()))

    def value(self, W: Point) -> float:
        """The loss alone."""
        r: Any = self._residual(W)
        return 1 - float((1 / (1 + r * r)).mean(dtype=torch.float64))


def on_torch(problem: ObservedCompletion, device: str | torch.device = "cuda") -> TorchCompletion:
    """The twin of a problem on a torch device.

    Args:
        problem: from `theory.problems.recovery.observed_completion`, or your own. device: such as ``"cuda"`` or
            ``"cpu"``.

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
    return TorchCompletion(problem, place)
