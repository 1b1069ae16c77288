"""The table of the kinds of layers that can carry a link. Each kind is a subclass of `AdaptedLayer`."""

from typing import TypeVar

from torch import nn

from cola.lora.conv1d import LoRAConv1D
from cola.lora.layer import AdaptedLayer, LoRALinear
from cola.lora.parameter import LinkedParameter
from cola.lora.quantized import QuantizedLinear
from cola.lora.reading import LinkedConvolution, LinkedEmbedding, LinkedReadLinear

Kind = TypeVar("Kind", bound=type[AdaptedLayer])

#: a module's kind is the first that matches it
KINDS: list[type[AdaptedLayer]] = [
    QuantizedLinear,
    LinkedReadLinear,
    LoRALinear,
    LoRAConv1D,
    LinkedEmbedding,
    LinkedConvolution,
    LinkedParameter,
]


def register_kind(kind: Kind) -> Kind:
    """Let a kind of layer carry links; usable as a class decorator. It takes precedence over the kinds known so far.

    Args:
        kind: a subclass of `cola.AdaptedLayer`.

    Raises:
        TypeError: ``kind`` is no such subclass, or sets neither ``plain_class`` nor ``matches``.

    >>> import torch
    >>> class Doubled(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.ones(2, 3))
    ...
    ...     def forward(self, x):
    ...         return 2 * x @ self.weight.t()
    >>> @register_kind
    ... class DoubledWithLink(AdaptedLayer):
    ...     plain_class = Doubled
    ...
    ...     def forward(self, x):
    ...         return Doubled.forward(self, x) + 2 * self.link(x)
    >>> kind_of(Doubled()).__name__
    'DoubledWithLink'
    >>> KINDS.remove(DoubledWithLink)
    """
    if not (isinstance(kind, type) and issubclass(kind, AdaptedLayer)):
        raise TypeError(f"register_kind(kind={kind!r:.80}) needs a subclass of cola.AdaptedLayer")
    if kind.plain_class is nn.Module and kind.matches.__func__ is AdaptedLayer.matches.__func__:  # type: ignore[attr-defined]
        raise TypeError(f"{kind.__name__} must set plain_class to the class of the layers that it adapts")
    if kind not in KINDS:
        KINDS.insert(0, kind)
    return kind


def kind_of(module: nn.Module) -> type[AdaptedLayer] | None:
    """The kind of ``module``, with or without a link; None if no kind matches."""
    if isinstance(module, AdaptedLayer):
        return type(module)
    return next((kind for kind in KINDS if kind.matches(module)), None)


def known_kind(module: nn.Module) -> type[AdaptedLayer]:
    """The kind of a module that has one."""
    kind = kind_of(module)
    assert kind is not None
    return kind


def is_linear(module: nn.Module) -> bool:
    """Whether ``target_modules="all-linear"`` includes ``module``."""
    kind = kind_of(module)
    return kind is not None and kind.linear


def is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is of a kind whose weight is stored as codes."""
    kind = kind_of(module)
    return kind is not None and kind.quantized


def refusal(module: nn.Module, *, stacked: bool = False) -> str | None:
    """Why ``module`` cannot carry a link, as the end of a sentence; None if it can. See `AdaptedLayer.refusal`."""
    if isinstance(module, AdaptedLayer):
        return "already carries a link: another ChainOptimizer owns this model; call its finish() first"
    kind = kind_of(module)
    if kind is None:
        name = type(module).__name__
        if name == "Linear":  # another library's
            name = f"{type(module).__module__}.{name}"
        article = "an" if name[0] in "AEIOU" else "a"
        return (
            f"is {article} {name}: links go on linear layers, embeddings and convolutions, on others by "
            "cola.register_kind, and on single parameters by target_parameters"
        )
    return kind.refusal(module, stacked=stacked)
