"""Links on layers whose own code reads the weight: embeddings, convolutions, linear layers with a forward of their own.

The code is left as it is, and finds ``W + s·B A`` where it reads ``self.weight`` (`cola.lora.linked_weight`).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cola.common.distributed import is_sharded
from cola.lora.layer import LINEAR, AdaptedLayer, class_over, empty, rebind
from cola.lora.linked_weight import linked


class ReadingLayer(AdaptedLayer):
    """A layer that reads its weight, with a link."""

    linear: ClassVar[bool] = False

    @classmethod
    def over(cls, plain: type[nn.Module]) -> "type[AdaptedLayer]":
        """As `AdaptedLayer.over`; `torch.compile` leaves the forward as it is."""
        made = super().over(plain)
        if "forward" not in vars(made):
            made.forward = torch.compiler.disable(plain.forward)
        return made

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``W + s·B A``, for the layer's own code."""
        return self.read(self.plain_weight, self.training)

    def read(self, plain: Tensor, training: bool) -> Tensor:
        """The weight with the link, to read in place of ``plain``."""
        if is_sharded(plain):  # FSDP2 looks for its own parameter; layers compute with whole ones
            return plain
        left, right = self.kind.sides(self, self.lora_A, self.lora_up)
        dropout = self.lora_dropout if training else 0.0
        return linked(plain, left, right, self.scaling, dropout, f"{self.plain_class.__name__}.weight")

    @property
    def plain_weight(self) -> Tensor:
        """The stored weight, without the link."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @classmethod
    def matrix(cls, module: nn.Module) -> Tensor:
        """As `AdaptedLayer.matrix`."""
        weight = cls.parameter(module)
        assert weight is not None
        return weight.detach()

    @classmethod
    def _forward_of(cls, module: nn.Module) -> Any:
        return type(module).forward


class LinkedReadLinear(ReadingLayer):
    """A subclass of nn.Linear with a forward of its own, or one that its parent reads without calling it."""

    plain_class = nn.Linear

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether ``module`` is such a layer. Falcon's is left to the kind of nn.Linear, which is faster."""
        own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        return (own and type(module).__name__ not in LINEAR) or type(module).__name__ == READ_BY_ATTENTION

    @classmethod
    def form(cls, module: nn.Module) -> str:
        """As `AdaptedLayer.form`."""
        return "attention output" if type(module).__name__.endswith(READ_BY_ATTENTION) else "linear with own forward"


#: the output projection of nn.MultiheadAttention
READ_BY_ATTENTION = "NonDynamicallyQuantizableLinear"


class LinkedEmbedding(ReadingLayer):
    """An embedding, or a table of positions: ``s·B A`` gives a token its column of A, times B."""

    plain_class = nn.Embedding
    transposed = True
    looks_up = True

    @classmethod
    def form(cls, module: nn.Module) -> str:
        """As `AdaptedLayer.form`."""
        plain = module.plain_class if isinstance(module, AdaptedLayer) else type(module)
        looks_up = plain.forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return "embedding" if looks_up else "table"

    @classmethod
    def refusal(cls, module: nn.Module, *, stacked: bool = False) -> str | None:
        """As `AdaptedLayer.refusal`."""
        if any(c.__module__.split(".")[0] == "bitsandbytes" for c in type(module).__mro__):
            return f"is bitsandbytes' {type(module).__name__}, whose weight is stored as codes"
        if getattr(module, "max_norm", None) is not None:
            return "has max_norm, by which looking up a row changes the weight"
        return super().refusal(module, stacked=stacked)

    def lend(self, others: Sequence[nn.Module]) -> None:
        """Let linear layers that share the weight (output heads) read it with the link."""
        lend(self, others)

    def detach(self, *, spent: bool = False) -> None:
        """As `AdaptedLayer.detach`; the layers that share the weight get their classes back, too."""
        take_back(self)
        super().detach(spent=spent)


class Borrowing(nn.Module):
    """A layer that shares its weight with another, and reads it as that one does: with a link, or with trained rows."""

    plain_class: ClassVar[type[nn.Module]] = nn.Module
    lender: tuple[Any]

    @classmethod
    def over(cls, plain: type[nn.Module]) -> Any:
        """This class, derived for layers of class ``plain``."""
        made = class_over(Borrowing, plain)
        made.forward = torch.compiler.disable(plain.forward)
        return made

    @property
    def weight(self) -> Tensor:
        """The weight as the lender reads it."""
        plain = self._parameters["weight"]
        assert plain is not None
        return self.lender[0].read(plain, self.training)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return empty, (Borrowing, self.plain_class), self.__dict__


def lend(lender: Any, others: Sequence[nn.Module]) -> None:
    """Let layers that share the lender's weight read it as the lender does."""
    lender.borrowers = tuple(others)
    for other in others:
        other.__class__ = Borrowing.over(type(other))
        vars(other)["lender"] = (lender,)  # in a tuple, so that it is no child


def take_back(lender: nn.Module) -> None:
    """Undo `lend`."""
    for other in vars(lender).pop("borrowers", ()):
        del vars(other)["lender"]
        other.__class__ = other.plain_class
        rebind(other)


class LinkedConvolution(ReadingLayer):
    """A convolution: one to r channels with A's kernels, and a 1×1 convolution with B from there, as in PEFT.

    The weight counts as a matrix of out × (in/groups · k …). With groups every group of inputs meets the same A.
    """

    plain_class = nn.modules.conv._ConvNd

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether ``module`` is a convolution, but no transposed one."""
        return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    @classmethod
    def form(cls, module: Any) -> str:
        """As `AdaptedLayer.form`."""
        plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
        return "convolution" if plain else "grouped convolution"

    @classmethod
    def matrix(cls, module: nn.Module) -> Tensor:
        """The weight as out × (in/groups · k …); a copy if its memory lies in another order (channels last)."""
        return super().matrix(module).flatten(1)

    @classmethod
    def put_back(cls, module: nn.Module, matrix: Tensor) -> None:
        """As `AdaptedLayer.put_back`."""
        weight = super().matrix(module)
        if not _same_memory(matrix, weight):
            weight.copy_(matrix.view(weight.shape))


def _same_memory(one: Tensor, other: Tensor) -> bool:
    one, other = (t.to_local() if hasattr(t, "to_local") else t for t in (one, other))
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
