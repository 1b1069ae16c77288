"""Links whose A selects inputs: ``A x`` is a gather, and r indices are kept instead of A.

``LinkConfig(train="B", init="selector")`` makes them. On a square layer such a link of rank 2r takes the memory of a
LoRA of rank r.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cola.common.distributed import copy_whole
from cola.knot.tie import KnotError
from cola.lora.layer import AdaptedLayer


class Selected(AdaptedLayer):
    """A layer with a link that keeps indices. `selecting` puts this class in front of the layer's kind.

    The indices are in the state dict, and are no buffer: DDP would send them at every forward, and fail once `detach`
    has removed the model's last one.

    Attributes:
        lora_columns: r indices; row i of A is the unit vector of input ``lora_columns[i]``.
    """

    entries = ("lora_columns", "lora_B")
    lora_columns: Tensor

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """A, r×in, made anew at every call."""
        return F.one_hot(self.lora_down, self.kind.shape(self.holder)[1]).to(self.lora_B.dtype)

    @property
    def lora_down(self) -> Tensor:
        """The indices, on B's device."""
        if self.lora_columns.device != self.lora_B.device:  # the model has been moved
            self.lora_columns = self.lora_columns.to(self.lora_B.device)
        return self.lora_columns

    def _hold(self, A: Tensor, B: Tensor) -> None:
        self.lora_columns = torch.zeros(len(A), dtype=torch.int64, device=A.device)
        self.lora_B = nn.Parameter(B)

    @torch.no_grad()
    def put(self, A: Tensor, B: Tensor, scaling: float, *, mask: bool) -> None:
        """As `AdaptedLayer.put`, for links of one rank.

        Raises:
            KnotError: A is no selection.
        """
        columns = A.argmax(1)
        if not torch.equal(F.one_hot(columns, A.shape[1]).to(A.dtype), A):
            raise KnotError('a link with init="selector" and train="B" keeps indices, and this A selects no inputs')
        self.lora_down.copy_(columns)
        copy_whole(self.lora_B, B)
        self.rank, self.scaling = A.shape[0], scaling

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "lora_columns"] = self.lora_columns.clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        columns = state_dict.pop(prefix + "lora_columns", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        _, strict, missing, *_ = args
        if columns is not None:
            self.lora_down.copy_(columns)
        elif strict:
            missing.append(prefix + "lora_columns")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self._made_by, self.plain_class), self.__dict__


def selecting(adapted: type[AdaptedLayer]) -> type[AdaptedLayer]:
    """The class of `AdaptedLayer.over`, for layers whose link keeps indices; a kind with a `put` of its own keeps A."""
    if adapted.put is not AdaptedLayer.put:
        return adapted
    if adapted not in _CLASSES:
        _CLASSES[adapted] = type(f"Selected{adapted.__name__}", (Selected, adapted), {})
    return _CLASSES[adapted]


_CLASSES: dict[type[AdaptedLayer], type[AdaptedLayer]] = {}


def _empty(kind: type[AdaptedLayer], plain: type[nn.Module]) -> nn.Module:
    """An instance for unpickling to fill."""
    return nn.Module.__new__(selecting(kind.over(plain)))
