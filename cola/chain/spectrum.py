"""The linear algebra of an update ``ΔW = Σ s B A`` from its factors alone: spectrum, best approximation, angles.

With ``[s₁B₁ s₂B₂ …] = Q_L R_L`` and ``[A₁; A₂; …]ᵀ = Q_R R_R``, ΔW = Q_L (R_L R_Rᵀ) Q_Rᵀ. So an SVD of the small matrix
in the middle gives one of ΔW, and ΔW itself (out×in) is never formed. Everything is in float64. Factors of E matrices
(fused experts) give E results, along the first dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cola.lora.link import Factor


def stack(factors: Sequence[Factor]) -> tuple[Tensor, Tensor]:
    """L (out×Σr) and R (Σr×in) with ``L R = Σ s B A``: the scaled Bs side by side, and the stacked As."""
    triples = [triple for factor in factors for triple in factor.triples()]
    return torch.cat([s * B.double() for _, B, s in triples], -1), torch.cat([A.double() for A, _, _ in triples], -2)


def svd(factors: Sequence[Factor]) -> tuple[Tensor, Tensor, Tensor]:
    """U (out×k), the k singular values (largest first) and Vᵀ (k×in) of the update; k is at most Σr."""
    left, right = stack(factors)
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
    u, values, v = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    return q_left @ u, values, v @ q_right.mT


def singular_values(factors: Sequence[Factor]) -> Tensor:
    """Singular values of the update, largest first."""
    left, right = stack(factors)
    return torch.linalg.svdvals(torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT)


def of_first(factors: Sequence[Factor], counts: Sequence[int]) -> list[Tensor]:
    """Singular values of the sum of the first k factors, for each k in ``counts``; zeros for k = 0.

    One QR serves all, because the first columns of R are those of the first columns' QR.
    """
    left, right = stack(factors)
    left, right = torch.linalg.qr(left).R, torch.linalg.qr(right.mT).R
    ends = [0]
    for factor in factors:
        ends.append(ends[-1] + sum(A.shape[-2] for A, _, _ in factor.triples()))
    return [torch.linalg.svdvals(left[..., : ends[k]] @ right[..., : ends[k]].mT) for k in counts]


def rank(factors: Sequence[Factor], tolerance: float | None = None) -> int:
    """Number of singular values above ``tolerance`` times the largest; see `Chain.effective_rank`."""
    return count(singular_values(factors), factors[0], tolerance)


def count(values: Tensor, factor: Factor, tolerance: float | None = None) -> int:
    """Number of singular values above ``tolerance`` times the largest; None for the precision of ``factor``.

    Of E matrices the largest number.
    """
    if tolerance is None:
        tolerance = torch.finfo(factor.A.dtype).eps * max(factor.A.shape[-1], factor.B.shape[-2])
    largest = values[..., :1]
    return int(((values > tolerance * largest) & (largest > 0)).sum(-1).max())


def truncate(factors: Sequence[Factor], r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of rank r: A (r×in), B (out×r), and all singular values of ΔW.

    ``‖ΔW − B A‖`` is the norm of the singular values left out (Eckart–Young). Q_L and Q_R are applied to r columns
    each, and never formed.
    """
    left, right = stack(factors)
    (left, left_tau), (right, right_tau) = torch.geqrf(left), torch.geqrf(right.mT)
    u, values, v = torch.linalg.svd(_upper(left) @ _upper(right).mT, full_matrices=False)
    root = values[..., None, :r].sqrt()
    down, up = _apply_q(right, right_tau, v[..., :r, :].mT * root).mT, _apply_q(left, left_tau, u[..., :r] * root)
    return down, up, values


def _upper(packed: Tensor) -> Tensor:
    """R of a QR decomposition as LAPACK packs it."""
    return packed[..., : packed.shape[-1], :].triu()


def _apply_q(packed: Tensor, tau: Tensor, columns: Tensor) -> Tensor:
    """``Q [columns; 0]``."""
    padded = columns.new_zeros(*packed.shape[:-1], columns.shape[-1])
    padded[..., : columns.shape[-2], :] = columns
    return torch.ormqr(packed[..., : tau.shape[-1]], tau, padded)


def cosines(one: Factor, two: Factor, side: str) -> Tensor:
    """Cosines of the principal angles between two updates' column (``"out"``) or row (``"in"``) spaces.

    Of E matrices a row each, with zeros after the last of a matrix.
    """
    first, second = _bases(one, side), _bases(two, side)
    found = [torch.linalg.svdvals(a.mT @ b).clamp(max=1.0) for a, b in zip(first, second)]
    return pad_sequence(found, batch_first=True) if one.A.dim() > 2 else found[0]


def _bases(factor: Factor, side: str) -> list[Tensor]:
    """Per matrix, orthonormal columns that span the space; fewer than r if the update has a smaller rank."""
    u, values, v = svd([factor])
    if values.dim() == 1:
        u, values, v = u[None], values[None], v[None]
    kept = [count(of_one, factor) for of_one in values]
    return [u_e[:, :k] if side == "out" else v_e[:k].mT for u_e, v_e, k in zip(u, v, kept)]
