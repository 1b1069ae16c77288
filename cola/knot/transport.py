"""The base's moments carried over a knot: rotated from the old link's directions into the new link's.

With A frozen, the gradient of B is ``s·G Aᵀ`` for the gradient G of the weight, so B's first moment M knows G in the
row space of A alone. In the new link's directions and scale this is ``M R`` with ``R = s_new/s·(A⁺)ᵀ A_newᵀ`` (LDAdam's
rule, with a pseudo-inverse because the rows of A need not be orthonormal). The second moment V is rotated by way of the
variance: ``|(V − M²)(R∘R) + (M R)²|``, with both freed of Adam's bias towards zero. For the share of a new direction
that the old ones do not reach, the mean of V's row is added; otherwise the first steps in new random directions would
be too long. Where both factors are trained, the moments of the one that does not begin at zero begin anew. Where the
parts of a layer have links of their own, each is rotated by itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cola.common.distributed import copy_whole, is_sharded, whole

Pairs = Mapping[str, tuple[Tensor, Tensor]]
#: a part of a layer: its output rows, and its directions in the old and in the new link
Block = tuple[Any, slice, slice]
_WHOLE: Block = (slice(None), slice(None), slice(None))

#: entries of a base's state that are sums of squares of gradients, and all that can be rotated
_SECOND = ("exp_avg_sq", "max_exp_avg_sq")
MOMENTS = ("exp_avg", "momentum_buffer", *_SECOND)


@torch.no_grad()
def transport(
    base: Optimizer,
    old: Pairs,
    new: Pairs,
    blocks: Mapping[str, Sequence[Block]] | None = None,
    scales: Mapping[str, float] | None = None,
) -> None:
    """Rotate the base's moments from the old links' directions into the new links', the rule of ``reset="transport"``.

    Args:
        base: with the state of the old link; Adam-like, Muon, or SGD with momentum.
        old: factors (A, B) of the link that ends, by layer.
        new: the Parameters of the link that begins.
        blocks: the parts of those layers whose parts have links of their own.
        scales: the new link's scale over the old one's, by layer; None where they are the same.
    """
    for path, (A, B) in old.items():
        new_A, new_B = new[path]
        mine, scale = (blocks or {}).get(path, (_WHOLE,)), (scales or {}).get(path, 1.0)
        after = whole(new_A.detach())
        if new_B in base.state and (new_A not in base.state or after.any()):
            turns = [(rows, o, n, *_rotation(A[..., o, :], scale, after[..., n, :])) for rows, o, n in mine]
            _carry(base, new_B, B.shape, turns)
            base.state.pop(new_A, None)
        elif new_A in base.state:  # an A that begins at zero has all of the first gradients
            after = whole(new_B.detach())
            turns = [
                (slice(None), o, n, *_rotation(B[..., rows, o].mT, scale, after[..., rows, n].mT))
                for rows, o, n in mine
            ]
            _carry(base, new_A, A.shape, turns, transposed=True)
            base.state.pop(new_B, None)


def _rotation(old: Tensor, scale: float, new: Tensor) -> tuple[Tensor, Tensor]:
    """R and the unknown share of each new direction.

    R, r×r', holds the coordinates of ``scale`` times ``new``'s rows (r'×n) in those of ``old`` (r×n), as far as these
    reach. The share is the squared norm of the part that they do not reach, in units of the old rows' mean squared
    norm, and 0 if all old rows are zero: so are the moments then.
    """
    old, new = old.double(), scale * new.to(old.device).double()
    rotation = torch.linalg.pinv(old).mT @ new.mT
    unreached = new.square().sum(-1) - (old.mT @ rotation).square().sum(-2)
    size = old.square().sum(-1).mean(-1, keepdim=True)
    return rotation, torch.where(size > 0, unreached.clamp(min=0) / size, 0.0).unsqueeze(-2)


#: a `Block` with its rotation and the unknown shares
_Turn = tuple[Any, slice, slice, Tensor, Tensor]


def _carry(
    base: Optimizer, parameter: Any, shape: torch.Size, turns: Sequence[_Turn], *, transposed: bool = False
) -> None:
    state, room = base.state[parameter], parameter.shape[-2 if transposed else -1]
    tensors = {name: state[name] for name in MOMENTS if isinstance(state.get(name), Tensor)}
    grown = _grown(base, parameter)
    # beyond the old rank a masked Parameter's state is zero
    moments = {name: _cut(whole(value), shape, transposed).double() / grown[name] for name, value in tensors.items()}
    for name, value in moments.items():
        mean = moments.get("exp_avg") if name in _SECOND else None
        turned = value.new_zeros(*value.shape[:-1], room)
        for rows, old, new, rotation, unknown in turns:
            turned[..., rows, new] = _turned(
                value[..., rows, old], None if mean is None else mean[..., rows, old], rotation, unknown
            )
        turned = grown[name] * (turned.mT if transposed else turned)
        turned = turned.to(tensors[name].dtype).contiguous()
        if is_sharded(parameter):
            state[name] = torch.zeros_like(parameter.detach(), dtype=turned.dtype)
            copy_whole(state[name], turned)
        else:
            state[name] = turned


def _grown(base: Optimizer, parameter: Any) -> dict[str, float]:
    """The weights that a moment's mean has gathered since it was zero: ``1 − βᵗ`` of Adam-like bases, 1 of others."""
    state = base.state[parameter]
    (group,) = (group for group in base.param_groups if any(p is parameter for p in group["params"]))
    first, second = 1.0, 1.0
    if "exp_avg_sq" in state and (t := float(state.get("step", 0))) > 0:
        first, second = (1 - float(beta) ** t for beta in group["betas"])
    return {name: second if name in _SECOND else first for name in MOMENTS}


def _turned(value: Tensor, mean: Tensor | None, rotation: Tensor, unknown: Tensor) -> Tensor:
    """A first moment in the new directions; a second one if the first, ``mean``, is given with it."""
    if mean is None:
        return value @ rotation
    turned = ((value - mean**2) @ rotation**2 + (mean @ rotation) ** 2).abs()
    return turned + unknown * value.mean(-1, keepdim=True)


def _cut(value: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    cut = value[..., : shape[-2], : shape[-1]]
    return cut.mT if transposed else cut
