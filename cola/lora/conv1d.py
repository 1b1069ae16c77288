"""Links on transformers' Conv1D, the linear layer of GPT-2, whose weight is stored as in×out.

The class is recognised by its name, so that transformers need not be imported.
"""

from typing import Any

from torch import nn

from cola.lora.layer import LoRALinear


class LoRAConv1D(LoRALinear):
    """A transformers Conv1D with a link."""

    plain_class = nn.Module
    transposed = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether ``module`` is a Conv1D of transformers."""
        return _conv1d(module) is not None

    @classmethod
    def _forward_of(cls, module: nn.Module) -> Any:
        plain = _conv1d(module)
        return None if plain is None else plain.forward


def _conv1d(module: nn.Module) -> type[nn.Module] | None:
    classes = (c for c in type(module).__mro__ if c.__name__ == "Conv1D")
    return next((c for c in classes if c.__module__ == "transformers.pytorch_utils"), None)
