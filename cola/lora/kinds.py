"""Adapted layers, one kind per file: what can carry a link, and how a link gets onto it and off it.

A layer is adapted in place: its object, hooks and parameters stay, and its class becomes a subclass that adds
``s·B A x`` to the output. Taking the adapter off restores the class, so nothing in the model remembers it.
"""

from torch import nn

from cola.lora import quantized
from cola.lora.layer import AdaptedLayer, LoRALinear
from cola.lora.quantized import QuantizedLinear, is_quantized
from cola.lora.stacked import StackedLinear

__all__ = [
    "AdaptedLayer",
    "LoRALinear",
    "StackedLinear",
    "adapted_class",
    "is_linear_map",
    "is_quantized",
    "quantized",
    "refusal",
]


#: subclasses of nn.Linear whose own forward is ``W x + b`` all the same: transformers' Falcon
LINEAR = ("FalconLinear",)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D (the linear layer of GPT-2), without importing transformers."""
    return _conv1d_class(module) is not None


def is_linear_map(module: nn.Module) -> bool:
    """Whether ``module`` is of a kind that a link can be added to: `nn.Linear` or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def adapted_class(module: nn.Module) -> type[AdaptedLayer]:
    """The adapted class for ``module``'s kind. Call `refusal` first."""
    if is_quantized(module):
        return QuantizedLinear.over(module.plain_class if isinstance(module, StackedLinear) else type(module))
    if isinstance(module, nn.Linear):
        return LoRALinear.over(type(module))
    from cola.lora.conv1d import LoRAConv1D  # here transformers has been imported already

    return LoRAConv1D.over(type(module))


def refusal(module: nn.Module, *, stacked: bool = False) -> str | None:
    """Why ``module`` cannot carry a link, as the end of a sentence; None if it can.

    Args:
        module: any module.
        stacked: whether it may have tied links beside it already, as quantised layers can.
    """
    if isinstance(module, AdaptedLayer):
        return "already carries a link: another ChainOptimizer owns this model; call its finish() first"
    if not is_linear_map(module):
        kind_name = type(module).__name__
        if kind_name == "Linear":  # one of that name which is not torch's
            kind_name = f"{type(module).__module__}.{kind_name}"
        return f"is a {kind_name}: links go on nn.Linear and transformers' Conv1D"
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "is the output projection of nn.MultiheadAttention, which reads its weight without calling it"
    if is_quantized(module):
        return quantized.refusal(module, stacked=stacked)
    kind = nn.Linear if isinstance(module, nn.Linear) else _conv1d_class(module)
    if type(module).forward is not kind.forward and type(module).__name__ not in LINEAR:  # type: ignore[union-attr]
        return f"is a {type(module).__name__} with a forward of its own, which a link could not follow"
    if "forward" in vars(module):
        return "has had its forward replaced on the instance (a dispatch hook?): make the ChainOptimizer before that"
    if "weight" not in module._parameters:
        return "has a weight that is computed (a parametrization?) and so cannot be tied in place"
    return None


def _conv1d_class(module: nn.Module) -> type[nn.Module] | None:
    classes = (c for c in type(module).__mro__ if c.__name__ == "Conv1D")
    return next((c for c in classes if c.__module__ == "transformers.pytorch_utils"), None)
