"""Reads, writes, decodes and encodes the codes of a quantised weight, a block of rows at a time.

`Codes` is the interface that re-quantising uses, with a subclass for each of bitsandbytes' two kinds of linear layer.
bitsandbytes does the arithmetic; it is imported when the first weight is decoded.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# elements per block: a megabyte in fp32, so that no fp32 tensor of the weight's size is ever held
_BLOCK = 1 << 18


class Codes(ABC):
    """The quantised weight of one layer, of shape (out, in).

    Args:
        module: the layer, whose weight is already quantised.

    Attributes:
        kind: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        limit: largest magnitude that can be encoded.
    """

    kind: str = ""
    limit: float

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.module.out_features, self.module.in_features

    @property
    def device(self) -> torch.device:
        """The codes' device."""
        return self.module.weight.device

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """The tensors that make up the weight, named as in the layer's state dict; not copies."""

    @abstractmethod
    def write(self, stored: Mapping[str, Tensor]) -> None:
        """Make ``stored`` the weight, in place: the layer keeps its tensor objects."""

    @abstractmethod
    def renew(self) -> None:
        """Copy the codes and scales into other memory; the weight stays the same object."""

    @abstractmethod
    def decoder(self, stored: Mapping[str, Tensor]) -> Callable[[slice], Tensor]:
        """A function from rows to their values in fp32, on the layer's device."""

    @abstractmethod
    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of a block of fp32 rows."""

    @abstractmethod
    def join(self, parts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Join `encode`'s results for all blocks, in order, into the form of `stored`."""

    @abstractmethod
    def row_step(self) -> int:
        """Blocks are multiples of this many rows, so that codes with one scale stay together."""

    def blocks(self) -> Iterator[slice]:
        """The rows, in blocks that fit a core's cache."""
        rows, step = self.shape[0], self.row_step()
        height = max(1, _BLOCK // (self.shape[1] * step)) * step
        for start in range(0, rows, height):
            yield slice(start, min(start + height, rows))

    def values(self) -> Tensor:
        """The whole weight in fp32, for comparisons; ties work block by block."""
        return self.decoder(self.stored())(slice(0, self.shape[0]))


class _FourBit(Codes):
    """`bitsandbytes.nn.Linear4bit`: groups of ``blocksize`` codes along the flattened weight share a scale.

    With double quantisation the scales are stored as 8-bit codes too.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.kind = self.module.weight.quant_state.quant_type
        self.limit = torch.finfo(self.module.weight.quant_state.dtype).max

    def stored(self) -> dict[str, Tensor]:
        weight = self.module.weight
        state = weight.quant_state.as_dict(packed=True)
        return {"weight": weight.detach(), **{f"weight.{name}": value for name, value in state.items()}}

    @torch.no_grad()
    def write(self, stored: Mapping[str, Tensor]) -> None:
        mine, theirs = self.module.weight.quant_state, self._state(stored)
        self.module.weight.copy_(stored["weight"].view_as(self.module.weight))
        mine.absmax.copy_(theirs.absmax)
        if mine.nested:
            mine.state2.absmax.copy_(theirs.state2.absmax)
            mine.offset.copy_(theirs.offset)

    def renew(self) -> None:
        weight, state = self.module.weight, self.module.weight.quant_state
        weight.data, state.absmax = weight.data.clone(), state.absmax.clone()
        if state.nested:
            state.state2.absmax = state.state2.absmax.clone()

    def decoder(self, stored: Mapping[str, Tensor]) -> Callable[[slice], Tensor]:
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        state, width = self._state(stored), self.shape[1]
        codes = stored["weight"].to(self.device).view(-1).view(torch.uint8)
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        scales = scales.float()

        def decode(rows: slice) -> Tensor:
            start, stop = rows.start * width, rows.stop * width
            part = codes[start // 2 : (stop + 1) // 2].view(-1, 1)
            groups = scales[start // state.blocksize : math.ceil(stop / state.blocksize)]
            shape = torch.Size((rows.stop - rows.start, width))
            # in fp32, whichever dtype the forward computes in
            own = QuantState(groups, shape, state.code, state.blocksize, state.quant_type, torch.float32)
            return dequantize_4bit(part, own)

        return decode

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        state = self.module.weight.quant_state
        codes, own = quantize_4bit(rows.contiguous(), blocksize=state.blocksize, quant_type=state.quant_type)
        return codes.view(-1), own.absmax

    def join(self, parts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        from bitsandbytes.functional import QuantState, quantize_blockwise

        mine, weight = self.module.weight.quant_state, self.module.weight
        scales: Tensor = torch.cat([scale for _, scale in parts])
        second: dict[str, Any] = {}
        if mine.nested:
            offset = scales.mean()
            scales, state2 = quantize_blockwise(scales - offset, blocksize=mine.state2.blocksize)
            second = {"offset": offset, "state2": state2}
        state = QuantState(scales, mine.shape, mine.code, mine.blocksize, mine.quant_type, mine.dtype, **second)
        codes = torch.cat([code for code, _ in parts]).view(weight.dtype).view_as(weight)
        return {"weight": codes, **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}}

    def row_step(self) -> int:
        blocksize: int = self.module.weight.quant_state.blocksize
        return blocksize // math.gcd(blocksize, self.shape[1])

    def _state(self, stored: Mapping[str, Tensor]) -> Any:
        from bitsandbytes.functional import QuantState

        named = {name.removeprefix("weight."): value for name, value in stored.items() if name != "weight"}
        return QuantState.from_dict(named, device=self.device)


class _EightBit(Codes):
    """`bitsandbytes.nn.Linear8bitLt`: 8-bit codes with a scale per row, encoded from fp16."""

    kind = "int8"
    limit = torch.finfo(torch.float16).max

    def stored(self) -> dict[str, Tensor]:
        module = self.module  # the layer's first forward moves both tensors from the parameter to its state
        held = module.weight if module.state.CB is None else module.state
        return {"weight": held.CB.detach(), "SCB": held.SCB.detach()}

    @torch.no_grad()
    def write(self, stored: Mapping[str, Tensor]) -> None:
        mine = self.stored()
        mine["weight"].copy_(stored["weight"])
        mine["SCB"].copy_(stored["SCB"])
        self.module.weight.copy_(stored["weight"])  # the same memory, unless the layer has been copied

    def renew(self) -> None:
        module = self.module
        held = module.weight if module.state.CB is None else module.state
        held.CB, held.SCB = held.CB.clone(), held.SCB.clone()
        module.weight.data = held.CB

    def decoder(self, stored: Mapping[str, Tensor]) -> Callable[[slice], Tensor]:
        codes, scales = stored["weight"].to(self.device), stored["SCB"].to(self.device)
        return lambda rows: codes[rows].float() * (scales[rows].float().unsqueeze(1) / 127)

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, scales, _ = int8_vectorwise_quant(rows.half())
        return codes, scales

    def join(self, parts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {"weight": torch.cat([code for code, _ in parts]), "SCB": torch.cat([scale for _, scale in parts])}

    def row_step(self) -> int:
        return 1


_KINDS: dict[str, type[Codes]] = {"Linear4bit": _FourBit, "Linear8bitLt": _EightBit}


def codes_kind(module: nn.Module) -> type[Codes] | None:
    """The `Codes` of ``module``, known by its class name; None if it is no quantised layer of bitsandbytes."""
    classes = (c for c in type(module).__mro__ if c.__module__.split(".")[0] == "bitsandbytes")
    return next((_KINDS[c.__name__] for c in classes if c.__name__ in _KINDS), None)


def codes_of(module: nn.Module) -> Codes:
    """The quantised weight of ``module``, which has a `codes_kind`."""
    kind = codes_kind(module)
    assert kind is not None
    return kind(module)
