"""Tied links kept next to a quantised weight, where its codes round nothing: ``y = Q(W) x + b + B̄ (Ā x)``."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cola.lora.layer import AdaptedLayer, Triple, class_over, empty, rebind
from cola.lora.quantized_codes import codes_of

#: the buffers of tied links
STACK = ("chain_A", "chain_B")


class StackedLinear(nn.Module):
    """A quantised layer with tied links next to its weight: ``Q(W) x + b + B̄ (Ā x)``.

    Attributes:
        chain_A: Ā, Σr×in; chain_B: B̄, out×Σr, which includes the scales. Both are buffers in the state dict.
    """

    chain_A: Tensor
    chain_B: Tensor
    plain_class: ClassVar[type[nn.Module]] = nn.Module

    @classmethod
    def over(cls, plain: type[nn.Module]) -> type[nn.Module]:
        """This class, derived for layers of class ``plain``."""
        return class_over(StackedLinear, plain)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return empty, (StackedLinear, self.plain_class), self.__dict__

    def forward(self, x: Tensor) -> Tensor:
        """The plain layer's output plus that of the tied links."""
        if not isinstance(self, StackedLinear):  # a hook kept this bound method after the links were removed
            return type(self).forward(self, x)
        out = self.plain_class.forward(self, x)
        return out + thin(x, self.chain_A, self.chain_B) if len(self.chain_A) else out

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As any module's, but with room for the state's links, and with the scales of the codes.

        bitsandbytes loads no scales into a 4-bit layer, nor into an 8-bit layer that has been used.
        """
        A, B = (state_dict.get(prefix + name) for name in STACK)
        if A is not None and B is not None and A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1]:
            fits = A.shape[1] == self.chain_A.shape[1] and B.shape[0] == self.chain_B.shape[0]
            if fits and A.shape != self.chain_A.shape:
                self.chain_A, self.chain_B = self.chain_A.new_empty(A.shape), self.chain_B.new_empty(B.shape)
        codes = codes_of(self)
        mine, unexpected = codes.stored(), list[str]()
        nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs
        )
        known = {prefix + name for name in (*mine, "weight_format")}
        unexpected_keys += [name for name in unexpected if name not in known]
        theirs = {name: state_dict[prefix + name] for name in mine if prefix + name in state_dict}
        if theirs.keys() != mine.keys():
            missing_keys += [prefix + name for name in mine if name not in theirs and name != "weight"]
            return
        differ = [name for name in mine if theirs[name].shape != mine[name].shape and "quant_state" not in name]
        if differ:
            error_msgs.append(
                f"{prefix}{differ[0]} is {tuple(theirs[differ[0]].shape)}: of other codes than this layer"
            )
        else:
            codes.write(theirs)

    def extra_repr(self) -> str:
        """The plain layer's text, with the rank of the tied links."""
        return f"{super().extra_repr()}, stacked={len(self.chain_A)}"


def stack_rank(module: nn.Module) -> int:
    """Rank of the links next to a layer's weight; 0 if there are none."""
    A = module._buffers.get("chain_A")
    return 0 if A is None else len(A)


def begin(module: Any) -> None:
    """Give a plain quantised layer an empty stack of links."""
    if isinstance(module, StackedLinear) and "chain_A" in module._buffers:
        return
    for name, none in zip(STACK, no_stack(module)):
        module.register_buffer(name, none)
    if not isinstance(module, StackedLinear):
        module.__class__ = StackedLinear.over(type(module))


def settle(module: nn.Module) -> None:
    """Turn a layer without any link, live or tied, back into its plain class."""
    if isinstance(module, StackedLinear) and not isinstance(module, AdaptedLayer) and not stack_rank(module):
        for name in STACK:
            del module._buffers[name]
        module.__class__ = module.plain_class  # type: ignore[assignment]
        rebind(module)


def thin(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``B (A x)`` in x's dtype."""
    return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


def scaled(B: Tensor, s: float) -> Tensor:
    """``s·B``, rounded once to at least fp32, which is exact for a half-precision B and most s."""
    return (B.double() * s).to(torch.promote_types(B.dtype, torch.float32))


def joined(A: Tensor, B: Tensor, links: Sequence[Triple]) -> tuple[Tensor, Tensor]:
    """Ā and B̄ with ``links`` added, in the widest of their dtypes and at least fp32."""
    rows = [A, *(a.to(A.device) for a, _, _ in links)]
    columns = [B, *(scaled(b, s).to(B.device) for _, b, s in links)]
    dtype = torch.float32
    for tensor in (*rows, *columns):
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([row.to(dtype) for row in rows]), torch.cat([column.to(dtype) for column in columns], 1)


def no_stack(module: Any) -> tuple[Tensor, Tensor]:
    """Ā and B̄ of no link."""
    like: Any = {"device": module.weight.device, "dtype": torch.float32}
    return torch.zeros(0, module.in_features, **like), torch.zeros(module.out_features, 0, **like)


def plain_class_of(module: nn.Module) -> type[nn.Module]:
    """The layer's class without links."""
    return module.plain_class if isinstance(module, StackedLinear) else type(module)
