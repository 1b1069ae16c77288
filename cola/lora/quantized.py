"""Links on quantised linear layers (bitsandbytes 4-bit and 8-bit), whose codes are too coarse to take a small update.

There are two ways to tie:

``"stack"`` keeps the tied links as factors, ``y = Q(W) x + b + B̄ (Ā x) + s·B (A x)``: Ā holds the rows of all A_k and
B̄ the columns of all s_k B_k. Nothing is lost; a forward costs two extra thin products, however long the chain.

``"requantize"`` replaces the codes by those of ``W₀ + Σ s_k B_k A_k``. W₀ is decoded from the original codes, which are
kept: quantising the last knot's codes again would lose small links one by one. The knot's ``lost_norm`` is the error of
the new codes: all of a ΣΔ far below the codes' steps, little of one above them. The layer stays plain.

Layers are recognised by class name; bitsandbytes is imported when the first one is tied.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cola.common.contexts import without_autocast
from cola.knot.tie import Tie, delta_norm
from cola.lora.layer import REPLACED, AdaptedLayer, Triple
from cola.lora.quantized_codes import Codes, codes_kind, codes_of
from cola.lora.stacked import (
    STACK,
    StackedLinear,
    begin,
    joined,
    no_stack,
    plain_class_of,
    scaled,
    settle,
    stack_rank,
    thin,
)

#: how links are tied to quantised weights
QUANTIZED = ("stack", "requantize")


class QuantizedLinear(AdaptedLayer, StackedLinear):
    """A quantised layer with a live link; earlier links are next to its weight or in its codes."""

    plain_class = nn.Linear
    quantized = True
    added = STACK

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether ``module`` is a linear layer of bitsandbytes or of a subclass."""
        names = (c.__module__.split(".")[0] for c in type(module).__mro__)
        return isinstance(module, nn.Linear) and "bitsandbytes" in names

    @classmethod
    def over(cls, plain: type[nn.Module]) -> type[AdaptedLayer]:
        """This class, derived for layers of class ``plain``, with or without tied links next to their weight."""
        return super().over(plain.plain_class if issubclass(plain, StackedLinear) else plain)

    @classmethod
    def refusal(cls, module: Any, *, stacked: bool = False) -> str | None:
        """As `AdaptedLayer.refusal`."""
        name, kind = plain_class_of(module).__name__, codes_kind(module)
        if kind is None:
            return f"is a {name} of bitsandbytes: links go on its Linear4bit and Linear8bitLt"
        if not plain_class_of(module).forward.__module__.startswith("bitsandbytes"):
            return f"is a {name} that overrides forward, which a link could not follow"
        if "forward" in vars(module):
            return REPLACED
        if "weight" not in module._parameters:
            return "has a weight that is computed (a parametrization?)"
        if kind.kind == "int8" and module.state.has_fp16_weights:
            return (
                f"is a {name} that keeps its weight in 16 bits and quantises it at every step: make it with "
                "has_fp16_weights=False, as load_in_8bit does"
            )
        if module.weight.is_floating_point() and getattr(module.weight, "quant_state", None) is None:
            return (
                f"is a {name} whose weight is not quantised yet: bitsandbytes does that when the model is moved, .to(…)"
            )
        if hasattr(module.weight, "full_tensor"):
            return f"is a {name} whose weight is sharded: use DDP"
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            return (
                "was rearranged by bitsandbytes for evaluation on this CPU, which rounds its scales and passes no "
                "gradient on: load the model again, and make the ChainOptimizer before it is evaluated"
            )
        if not stacked and stack_rank(module):
            return (
                "carries the links of a finished chain: load the base anew (opt.follow(chain) goes on along a chain), "
                "or export them by chain.to_peft"
            )
        return None

    @classmethod
    def parts(cls, module: nn.Module) -> dict[str, Tensor]:
        """The scales of the codes; empty if the layer is not quantised yet."""
        floating = module.weight.is_floating_point()  # type: ignore[operator]
        if codes_kind(module) is None or (floating and not hasattr(module.weight, "quant_state")):
            return {}
        return {name: value for name, value in codes_of(module).stored().items() if name != "weight"}

    @classmethod
    def obstacle(cls, module: nn.Module, links: Sequence[Triple], memory: Any = None) -> str | None:
        """As `AdaptedLayer.obstacle`; ``memory`` is the `OriginalWeight` to re-quantise from, None to stack."""
        return obstacle(module, links, memory)

    @classmethod
    def tie(cls, module: nn.Module, link: Triple, *, rounding: str, seed: int, memory: Any = None) -> Tie:
        """As `AdaptedLayer.tie`; ``memory`` as in `obstacle`."""
        (done,) = tie(module, [link], memory)
        return done

    def attach(self, A: Tensor, B: Tensor, scaling: float, dropout: float) -> None:
        """As `AdaptedLayer.attach`, with an empty stack."""
        super().attach(A, B, scaling, dropout)
        begin(self)

    def detach(self, *, spent: bool = False) -> None:
        """Remove the live link. A layer with stacked links keeps these; any other gets its plain class back."""
        plain = self.plain_class
        super().detach(spent=spent)
        self.__class__ = StackedLinear.over(plain)  # type: ignore[assignment]
        settle(self)

    @classmethod
    def shape(cls, module: nn.Module) -> tuple[int, int]:
        """(out, in): the codes are stored flat."""
        return module.out_features, module.in_features  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """``Q(W) x + b + B̄ Ā x + s·B A x``; dropout, where set, acts on the live link's input in training."""
        if not isinstance(self, QuantizedLinear):  # a hook kept this bound method after the chain was finished
            return type(self).forward(self, x)
        link_input = F.dropout(x, self.lora_dropout, self.training)
        return StackedLinear.forward(self, x) + self.scaling * thin(link_input, self.lora_A, self.lora_up)

    def reference(self, x: Tensor) -> Tensor:
        """The slow twin: the same function, from the decoded weight."""
        weight = codes_of(self).values() + (self.chain_B @ self.chain_A).float()
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        out = F.linear(x.float(), weight, None if bias is None else bias.float())
        link_input = F.dropout(x.float(), self.lora_dropout, self.training)
        return (out + self.scaling * thin(link_input, self.lora_A, self.lora_up)).to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        AdaptedLayer._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)


@dataclass
class OriginalWeight:
    """The weight before the first knot and the links tied since, from which each knot re-quantises.

    Attributes:
        stored: the original codes and scales, from `cola.lora.quantized_codes.Codes.stored`.
        A, B: rows and columns of all tied links; B includes the scales, so ``ΣΔ = B A``.
    """

    stored: Mapping[str, Tensor]
    A: Tensor
    B: Tensor

    @classmethod
    def of(cls, module: nn.Module, device: str | None = None) -> "OriginalWeight":
        """Copy the present weight of a quantised layer to ``device``, None for the weight's device."""
        codes = codes_of(module)
        (out, inner), where = codes.shape, torch.device(device or codes.device)
        stored = {name: value.to(where, copy=True) for name, value in codes.stored().items()}
        like: Any = {"device": where, "dtype": torch.float32}
        return cls(stored, torch.zeros(0, inner, **like), torch.zeros(out, 0, **like))

    def extended(self, links: Sequence[Triple]) -> "OriginalWeight":
        """The same with ``links`` tied."""
        A, B = joined(self.A, self.B, links)
        return OriginalWeight(self.stored, A, B)

    def bare(self) -> "OriginalWeight":
        """The same without tied links."""
        return OriginalWeight(self.stored, self.A[:0], self.B[:, :0])


@torch.no_grad()
def obstacle(module: nn.Module, links: Sequence[Triple], origin: OriginalWeight | None) -> str | None:
    """Why the layer could not store the tied values, as the end of a sentence about it; None if it could."""
    if not all(torch.isfinite(scaled(B, s)).all() for _, B, s in links):
        return "would get an s·B beyond the largest number of its dtype"
    if origin is None:
        return None
    codes, after = codes_of(module), origin.extended(links)
    decode, A, B = codes.decoder(origin.stored), after.A.to(codes.device), after.B.to(codes.device)
    for rows in codes.blocks():
        if not torch.addmm(decode(rows), B[rows].float(), A.float()).abs().amax() <= codes.limit:
            return (
                f"would get a W + ΣsBA beyond {codes.limit:g}, the largest number that its {codes.kind} codes scale to"
            )
    return None


@torch.no_grad()
@without_autocast()
def tie(module: nn.Module, links: Sequence[Triple], origin: OriginalWeight | None) -> list[Tie]:
    """Tie links, in order, to a quantised layer.

    Args:
        module: changed in place; stacking turns a plain layer into a `StackedLinear`.
        links: (A, B, s) of each link.
        origin: None to stack; else the weight to re-quantise from, which takes the links up.

    Returns:
        Per link its norm and the norm lost; with the last one the weight's norm. A stacked link loses the rounding of
        ``s·B``. The last re-quantised one reports the layer's quantisation error, ``‖Q(W₀ + ΣΔ) − (W₀ + ΣΔ)‖``; those
        before it are not measured (NaN).
    """
    if not links:
        return []
    if origin is None:
        begin(module)
        stored = [scaled(B, s) for _, B, s in links]
        module.chain_A, module.chain_B = joined(module.chain_A, module.chain_B, links)  # type: ignore[arg-type]
        lost = [delta_norm(b.double() - B.double() * s, A, 1.0) for b, (A, B, s) in zip(stored, links)]
        norm = weight_norm(module)
    else:
        after = origin.extended(links)
        new, error, norm = requantized(codes_of(module), after)
        codes_of(module).write(new)
        origin.A, origin.B = after.A, after.B
        lost = [math.nan] * (len(links) - 1) + [error]
    norms = [*[None] * (len(links) - 1), norm]
    return [Tie(delta_norm(B, A, s), loss, loss, norm) for (A, B, s), loss, norm in zip(links, lost, norms)]


@torch.no_grad()
def weight_norm(module: Any) -> float:
    """``‖Q(W) + B̄ Ā‖`` of a layer with stacked links, block by block."""
    codes = codes_of(module)
    decode, A, B = codes.decoder(codes.stored()), module.chain_A.float(), module.chain_B.float()
    squares = torch.zeros((), dtype=torch.float64, device=codes.device)
    for rows in codes.blocks():
        squares += torch.linalg.vector_norm(torch.addmm(decode(rows), B[rows], A), dtype=torch.float64) ** 2
    return squares.sqrt().item()


@torch.no_grad()
@without_autocast()
def requantized(codes: Codes, origin: OriginalWeight) -> tuple[dict[str, Tensor], float, float]:
    """The codes of ``W₀ + ΣΔ``, their error in Frobenius norm, and their norm. Changes nothing.

    Works on blocks of rows in fp32, so that the new codes are the only matrix of the weight's size.
    """
    decode = codes.decoder(origin.stored)
    A, B = origin.A.to(codes.device).float(), origin.B.to(codes.device).float()
    new = codes.join([codes.encode(torch.addmm(decode(rows), B[rows], A)) for rows in codes.blocks()])
    again, squares = codes.decoder(new), torch.zeros(2, dtype=torch.float64, device=codes.device)
    for rows in codes.blocks():  # a second pass: quantised scales are only known after the first
        stored = again(rows)
        error = torch.addmm(decode(rows), B[rows], A).sub_(stored)
        squares += torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) ** 2 for part in (error, stored)])
    error_norm, norm = squares.sqrt().tolist()
    return new, error_norm, norm


def parts(module: nn.Module) -> dict[str, Tensor]:
    """A layer's codes, scales and tied links: all of its function but the bias and the live link."""
    found = codes_of(module).stored()
    if stack_rank(module):
        found.update({name: module._buffers[name] for name in STACK})  # type: ignore[misc]
    return found


@torch.no_grad()
def put_parts(module: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Give a layer the `parts` of another like it."""
    codes = codes_of(module)
    codes.write({name: value for name, value in found.items() if name not in STACK})
    for name, none in zip(STACK, no_stack(module)):
        if name in module._buffers:
            module._buffers[name] = found[name].to(codes.device, copy=True) if name in found else none


def renew(module: nn.Module) -> None:
    """Copy a layer's codes and scales into other memory, so that writing them leaves what was read as it is."""
    codes_of(module).renew()


def part_names(module: nn.Module) -> list[str]:
    """Names of the tensors that make up the weight, in a state dict of the untouched layer."""
    return list(codes_of(module).stored())


@torch.no_grad()
def untie(module: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Make ``stored`` the weight again and remove all tied links; `settle` also restores the class."""
    put_parts(module, {name: value for name, value in stored.items() if name not in STACK})


def hold_layout(model: nn.Module) -> list[nn.Module]:
    """Stop bitsandbytes from rearranging 4-bit weights for evaluation on some CPUs; returns the layers concerned.

    Training could not undo the change: it rounds the scales to bf16, passes no gradient on, and raises for sizes that
    are not multiples of 32.
    """
    held = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    for module in held:
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return held


def release_layout(held: Sequence[nn.Module]) -> None:
    """Undo `hold_layout`."""
    for module in held:
        module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
