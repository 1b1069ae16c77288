"""The iterate ``W``, its vertices and its gradients: how they are stored, moved and paired.

A vertex ``V`` is a dense array or a `LowRank` product. An iterate is a `DensePoint` or an `ObservedPoint`.
An `ObservedPoint` keeps the atoms that it sums and its entries on an observed set, so a 1e5 x 1e5 iterate
takes megabytes instead of 80 GB. A gradient is a dense array, or an `ObservedMatrix` on the same set.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array

# A row block of this size stays in the second-level cache over several passes.
BLOCK_BYTES = 1 << 19


def row_blocks(array: np.ndarray) -> list[slice]:
    """Slices of rows that fit the cache; one slice for a small matrix."""
    rows = array.shape[0]
    step = max(1, BLOCK_BYTES // max(1, array.strides[0])) if array.nbytes > 4 * BLOCK_BYTES else max(rows, 1)
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


@dataclass(frozen=True)
class LowRank:
    """The matrix ``left @ right``, with ``left`` of shape (m, r) and ``right`` of shape (r, n)."""

    left: np.ndarray
    right: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (m, n) of the product."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def norm2(self) -> float:
        """The squared Frobenius norm, from the r x r Gram matrices alone."""
        return float(((self.left.T @ self.left) * (self.right @ self.right.T)).sum())

    def dense(self) -> np.ndarray:
        """The product as an (m, n) array."""
        return self.left @ self.right


Vertex = np.ndarray | LowRank


class Pattern:
    """The observed set of an (m, n) matrix: index pairs sorted by row, shared by every matrix on that set.

    The methods `native`, `take`, `compressed` and `to_numpy` are all that depends on the array library;
    `theory.torch_backend` overrides them.

    Args:
        rows, cols: integer arrays of equal length, the observed positions; duplicates raise.
        shape: (m, n).
    """

    def __init__(self, rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int]):
        rows, cols = np.asarray(rows), np.asarray(cols)
        if rows.shape != cols.shape or rows.ndim != 1 or rows.size == 0:
            raise ValueError(
                f"rows and cols must be vectors of one length above 0, got {rows.shape} and {cols.shape}: "
                "give one (row, column) pair per observed entry"
            )
        if rows.min() < 0 or cols.min() < 0 or rows.max() >= shape[0] or cols.max() >= shape[1]:
            raise ValueError(
                f"rows and cols must index a matrix of shape {shape}, got rows up to {rows.max()} and "
                f"columns up to {cols.max()}: drop the pairs outside"
            )
        flat = np.sort(rows.astype(np.int64) * shape[1] + cols)
        if np.any(flat[1:] == flat[:-1]):
            raise ValueError("rows and cols hold the same pair twice: average repeated observations first")
        self.shape = shape
        self.rows = (flat // shape[1]).astype(np.int32)
        self.cols = (flat % shape[1]).astype(np.int32)
        counts = np.bincount(self.rows, minlength=shape[0])
        self.indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self.by_column = np.argsort(self.cols, kind="stable").astype(np.int32)
        self.row_of_column = self.rows[self.by_column]
        counts = np.bincount(self.cols, minlength=shape[1])
        self.column_indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def entries(self, V: Vertex) -> Any:
        """The entries of ``V`` on the observed set, in this pattern's order."""
        if isinstance(V, np.ndarray):
            return V[self.rows, self.cols]
        out = self.take(V.left[:, 0], self.rows)
        out *= self.take(V.right[0], self.cols)
        for k in range(1, V.left.shape[1]):
            out += self.take(V.left[:, k], self.rows) * self.take(V.right[k], self.cols)
        return out

    def native(self, array: Any, dtype: Any) -> Any:
        """An array in the storage and precision of matrices on this pattern."""
        return np.asarray(array, dtype=dtype)

    def take(self, vector: Any, index: Any) -> Any:
        """The indexed entries of a native vector."""
        return vector.take(index)

    def compressed(self, values: Any, columns: Any, indptr: Any, shape: tuple[int, int]) -> Any:
        """A sparse matrix from its compressed rows."""
        return csr_array((values, columns, indptr), shape=shape)

    def to_numpy(self, matrix: Any) -> np.ndarray:
        """A native matrix, dense or sparse, as a NumPy array."""
        return matrix if isinstance(matrix, np.ndarray) else matrix.toarray()


class ObservedMatrix:
    """A matrix that is zero outside a `Pattern`; the gradient of a loss over observed entries.

    It is kept row by row and column by column. A gather per row is several times faster than the scatter of
    a transposed product, and the reordering is paid once per gradient instead of once per product.
    """

    def __init__(self, pattern: Pattern, values: Any):
        self.pattern, self.values = pattern, values
        m, n = pattern.shape
        columnwise = pattern.take(values, pattern.by_column)
        self.by_rows = pattern.compressed(values, pattern.cols, pattern.indptr, (m, n))
        self.by_columns = pattern.compressed(columnwise, pattern.row_of_column, pattern.column_indptr, (n, m))

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (m, n)."""
        return self.pattern.shape

    @property
    def dtype(self) -> np.dtype:
        """The element type of the values, in NumPy's terms."""
        return np.dtype(str(self.values.dtype).removeprefix("torch."))

    def native(self, array: np.ndarray) -> Any:
        """An array that can be multiplied by this matrix."""
        return self.pattern.native(array, self.dtype)

    def toarray(self) -> np.ndarray:
        """The matrix as a dense NumPy array; for small checks."""
        return self.pattern.to_numpy(self.by_rows)


Gradient = np.ndarray | ObservedMatrix


def as_array(X: Gradient | Vertex) -> np.ndarray:
    """A gradient or a vertex as a dense array."""
    if isinstance(X, ObservedMatrix):
        return X.toarray()
    return X.dense() if isinstance(X, LowRank) else X


def inner(G: Gradient, V: Vertex) -> float:
    """The Frobenius pairing ``<G, V>`` of a gradient and a vertex, in float64."""
    if isinstance(G, ObservedMatrix):
        if isinstance(V, LowRank):
            return float(sum(V.left[:, k] @ (G.by_rows @ V.right[k]) for k in range(V.left.shape[1])))
        return float(G.values @ G.pattern.entries(V))
    if isinstance(V, LowRank):
        return float(np.sum(V.left * (G @ V.right.T)))
    return float(np.dot(G.ravel(), V.ravel()))


def norm(G: Gradient) -> float:
    """The Frobenius norm of a gradient."""
    values = G.values if isinstance(G, ObservedMatrix) else G.ravel()
    return math.sqrt(float(values @ values))


class Point(ABC):
    """An iterate ``W`` of ``K``; it moves in place."""

    @property
    @abstractmethod
    def norm2(self) -> float:
        """The squared Frobenius norm."""

    @abstractmethod
    def inner(self, G: Gradient) -> float:
        """The pairing ``<G, W>``."""

    @abstractmethod
    def dot(self, V: Vertex) -> float:
        """The pairing ``<W, V>`` with a vertex."""

    @abstractmethod
    def move(self, V: Vertex, eta: float) -> None:
        """Replace ``W`` by ``W + eta (V - W)``."""

    @abstractmethod
    def copy(self) -> Point:
        """An independent copy."""

    @abstractmethod
    def dense(self) -> np.ndarray:
        """The iterate as an array, not necessarily a copy."""

    def distance2(self, V: Vertex) -> float:
        """The squared Frobenius distance from ``W`` to a vertex."""
        own = V.norm2 if isinstance(V, LowRank) else float(np.dot(V.ravel(), V.ravel()))
        return max(0.0, own - 2 * self.dot(V) + self.norm2)


class DensePoint(Point):
    """An iterate held as one array of any shape.

    Args:
        array: the starting point, which is copied.
    """

    def __init__(self, array: np.ndarray):
        self.array = np.array(array, dtype=float, order="C")
        self._norm2: float | None = None

    @property
    def norm2(self) -> float:
        """The squared norm; cached until a dense vertex moves the point."""
        if self._norm2 is None:
            self._norm2 = float(np.dot(self.array.ravel(), self.array.ravel()))
        return self._norm2

    def inner(self, G: Gradient) -> float:
        """The pairing ``<G, W>``."""
        return inner(G, self.array)

    def dot(self, V: Vertex) -> float:
        """The pairing ``<W, V>``."""
        return inner(self.array, V)

    def distance2(self, V: Vertex) -> float:
        """The squared distance to ``V``, from the difference where that is cheap: nothing cancels there."""
        if isinstance(V, LowRank) and self.array.nbytes > BLOCK_BYTES:
            return super().distance2(V)
        gap = as_array(V) - self.array
        return float(np.dot(gap.ravel(), gap.ravel()))

    def move(self, V: Vertex, eta: float) -> None:
        """Replace ``W`` by ``W + eta (V - W)``, block by block for a low-rank vertex."""
        W = self.array
        self._norm2 = None
        if not isinstance(V, LowRank):
            W += eta * (V - W)
            return
        norm2, buffer = 0.0, np.empty(0)
        # multiply is twice as fast as matmul for an outer product
        product = np.multiply if V.right.shape[0] == 1 else np.matmul
        for rows in row_blocks(W):
            block = W[rows]
            buffer = buffer if buffer.shape == block.shape else np.empty_like(block)
            product(eta * V.left[rows], V.right, out=buffer)
            block *= 1 - eta
            block += buffer
            norm2 += float(np.dot(block.ravel(), block.ravel()))
        self._norm2 = norm2

    def copy(self) -> DensePoint:
        """An independent copy."""
        return DensePoint(self.array)

    def dense(self) -> np.ndarray:
        """The array itself."""
        return self.array


class ObservedPoint(Point):
    """An iterate stored as a sum of atoms, ``W = sum_k weight_k left_k right_k``, that starts at zero.

    Its entries on the observed set are stored too; nothing of size mn is.

    Args:
        pattern: the observed set.
        dtype: precision of entries and atoms; float32 halves the memory.
    """

    def __init__(self, pattern: Pattern, dtype: Any = np.float64):
        self.pattern, self.dtype = pattern, np.dtype(dtype)
        self.values = pattern.native(np.zeros(len(pattern)), self.dtype)
        self.lefts: list[np.ndarray] = []
        self.rights: list[np.ndarray] = []
        self.weights = np.zeros(0)
        self._norm2 = 0.0

    @property
    def norm2(self) -> float:
        """The squared norm of the whole matrix, updated by `move`."""
        return self._norm2

    def inner(self, G: Gradient) -> float:
        """The pairing ``<G, W>``, for a gradient on the same pattern: it is zero elsewhere."""
        if not isinstance(G, ObservedMatrix) or G.pattern is not self.pattern:
            raise ValueError(
                f"G must be an ObservedMatrix on its own pattern, got {type(G).__name__}: a sum of atoms "
                "pairs only with gradients on the same observed set"
            )
        return float(G.values @ self.values)

    def dot(self, V: Vertex) -> float:
        """The pairing ``<W, V>``, atom by atom."""
        if not isinstance(V, LowRank):
            return float(np.sum(self.dense() * V))
        terms = [float(((left.T @ V.left) * (right @ V.right.T)).sum()) for left, right in zip(self.lefts, self.rights)]
        return float(np.dot(self.weights, terms)) if terms else 0.0

    def move(self, V: Vertex, eta: float) -> None:
        """Replace ``W`` by ``W + eta (V - W)``: scale the weights and add an atom."""
        if not isinstance(V, LowRank):
            raise ValueError(
                f"V must be a LowRank vertex, got {type(V).__name__}: this iterate is a sum of atoms, so "
                "use the trace ball or a rank-r ball as the oracle"
            )
        self._norm2 = max(
            0.0,
            (1 - eta) ** 2 * self._norm2 + 2 * eta * (1 - eta) * self.dot(V) + eta**2 * V.norm2,
        )
        self.values *= 1 - eta
        step = self.pattern.entries(V)
        step *= eta
        self.values += step
        self.weights = np.append(self.weights * (1 - eta), eta)
        self.lefts.append(V.left)
        self.rights.append(V.right)

    def trace_norm_bound(self) -> float:
        """``sum_k weight_k |left_k| |right_k|``, an upper bound on the trace norm of the whole matrix."""
        sizes = [
            float((((left * left).sum(0) * (right * right).sum(1)) ** 0.5).sum())
            for left, right in zip(self.lefts, self.rights)
        ]
        return float(np.dot(self.weights, sizes)) if sizes else 0.0

    def copy(self) -> ObservedPoint:
        """A copy that shares the atoms, which never change."""
        twin = copy(self)
        twin.values, twin.lefts, twin.rights = deepcopy(self.values), list(self.lefts), list(self.rights)
        return twin

    def dense(self) -> np.ndarray:
        """The whole matrix as a NumPy array; for small checks."""
        out = np.zeros(self.pattern.shape)
        for weight, left, right in zip(self.weights, self.lefts, self.rights):
            out += weight * self.pattern.to_numpy(left @ right)
        return out
