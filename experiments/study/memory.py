"""Bytes of trained state: what must be kept to train, and a base model that is only read does not need."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cola import AdaptedLayer, ChainOptimizer


def trained_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of the trained parameters, their gradients, the optimizer state, and the frozen factors of a live link.

    Call it after a step and before `zero_grad`.
    """
    different = {id(tensor): tensor for tensor in _kept(optimizer)}  # holding them keeps their ids different
    return sum(tensor.numel() * tensor.element_size() for tensor in different.values())


def _kept(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor):
                    yield value
                elif hasattr(value, "ortho_matrix"):  # GaLore's projector
                    yield value.ortho_matrix
    if isinstance(optimizer, ChainOptimizer):
        for layer in optimizer.live.layers.values():
            assert isinstance(layer, AdaptedLayer)
            yield from (getattr(layer, name) for name in layer.entries)
