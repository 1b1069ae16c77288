"""PEFT's LoRA and DoRA, with AdamW: what a chain of one link is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn


class AdapterAdamW(torch.optim.AdamW):
    """AdamW over an adapter that PEFT puts into the model.

    Args:
        model: changed in place: its layers become PEFT's until `finish`.
        paths: of the layers.
        seed: A is drawn from it.
        adapter: arguments of PEFT's LoraConfig.
        **kwargs: of AdamW.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], seed: int, adapter: Mapping[str, Any], **kwargs: Any
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adapter = LoraModel(model, LoraConfig(target_modules=list(paths), **adapter), "default")
        super().__init__([p for p in model.parameters() if p.requires_grad], **kwargs)

    def finish(self) -> None:
        """Merge the adapter into the weights, and give the model its own layers back."""
        self.adapter.merge_and_unload()
