"""Layers whose parts have links of their own (`cola.lora.parts`): B is zero but for each part's rows and columns.

The layer and the tie see B through a mask, so its gradient and with it the base's moments are zero elsewhere, too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cola.lora.layer import AdaptedLayer
from cola.lora.parts import Part
from cola.lora.selected import Selected, selecting

_NO_PART, _NO_RANK = -1, -2  # they differ, so that such rows and columns never meet


class Parted(AdaptedLayer):
    """A layer with a link per part. `parting` puts this class in front of the layer's class.

    Attributes:
        lora_part_of_row: the number of each output row's part, −1 for none.
        lora_part_of_rank: the same for the link's directions.
    """

    lora_part_of_row: Tensor
    lora_part_of_rank: Tensor

    @property
    def lora_up(self) -> Tensor:
        """B, zero outside the parts."""
        return self.within(self.lora_B)

    def within(self, B: Tensor) -> Tensor:
        """B (out×r, or with room for more) with zeros outside the parts."""
        if self.lora_part_of_row.device != B.device:  # the model has been moved
            self.lora_part_of_row = self.lora_part_of_row.to(B.device)
            self.lora_part_of_rank = self.lora_part_of_rank.to(B.device)
        numbers = self.lora_part_of_rank[: B.shape[1]]
        numbers = F.pad(numbers, (0, B.shape[1] - len(numbers)), value=_NO_RANK)
        return B.masked_fill(self.lora_part_of_row[:, None] != numbers, 0.0)

    def divide(self, parts: Sequence[Part], ranks: Sequence[int]) -> None:
        """Say which rows and directions are whose.

        Args:
            parts: of the layer.
            ranks: of the present link, by part.
        """
        device = self.lora_B.device
        rows = torch.full(self.kind.shape(self.holder)[:1], _NO_PART, device="cpu")
        for number, part in enumerate(parts):
            rows[part.rows] = number
        self.lora_part_of_row = rows.to(device)
        numbers = torch.arange(len(ranks), device="cpu")
        self.lora_part_of_rank = numbers.repeat_interleave(torch.tensor(ranks, device="cpu")).to(device)

    def detach(self, *, spent: bool = False) -> None:
        """As `AdaptedLayer.detach`."""
        del self.lora_part_of_row, self.lora_part_of_rank
        super().detach(spent=spent)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self._made_by, self.plain_class, isinstance(self, Selected)), self.__dict__


def parting(adapted: type[AdaptedLayer]) -> type[AdaptedLayer]:
    """The class of `AdaptedLayer.over`, or of `selecting`, for layers whose parts have links of their own."""
    if adapted not in _CLASSES:
        _CLASSES[adapted] = type(f"Parted{adapted.__name__}", (Parted, adapted), {})
    return _CLASSES[adapted]


_CLASSES: dict[type[AdaptedLayer], type[AdaptedLayer]] = {}


def _empty(kind: type[AdaptedLayer], plain: type[nn.Module], selects: bool) -> nn.Module:
    """An instance for unpickling to fill."""
    adapted = kind.over(plain)
    return nn.Module.__new__(parting(selecting(adapted) if selects else adapted))
