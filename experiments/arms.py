"""The arms of the comparison: what each trains, when it ties a knot, which rates it may choose from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from cola import ChainOptimizer, EvenKnots, KnotPolicy, LinkConfig, NeverKnots, PlateauKnots

TARGETS = ["q_proj", "v_proj"]
"""The layers that get adapters, the paper's."""

SCALING = 2.0
"""s of W + s·B·A for every link: the paper's lora_alpha / r = 16 / 8, kept when the rank changes."""


@dataclass(frozen=True)
class Arm:
    """One method.

    Attributes:
        name: as on the command line and in the results.
        label: as in the table and the plot.
        policy: total steps of the run -> when to tie; None trains all weights with the plain base optimizer.
        rates: AdamW's peak learning rates for the whole grid, rising.
        recorded: the best rate so far by validation loss (RESULTS.md); a default run tries it and its neighbours.
        rank: of the links: one number, or one per link.
        control: True for an arm of the whole comparison only.
    """

    name: str
    label: str
    policy: Callable[[int], KnotPolicy] | None
    rates: tuple[float, ...]
    recorded: float
    rank: int | tuple[int, ...] = 8
    control: bool = False

    def __post_init__(self) -> None:
        if self.recorded not in self.rates:
            raise ValueError(f"{self.name}: recorded={self.recorded} is not among rates={self.rates}")

    def nearby(self, count: int) -> tuple[float, ...]:
        """The `count` rates of the grid nearest to the recorded one, the lower where two are as near."""
        at = self.rates.index(self.recorded)
        order = sorted(range(len(self.rates)), key=lambda index: (abs(index - at), index))
        return tuple(self.rates[index] for index in sorted(order[:count]))

    def optimizer(self, model: nn.Module, *, lr: float, seed: int, total_steps: int) -> torch.optim.Optimizer:
        """AdamW without weight decay on what this arm trains, in a `ChainOptimizer` for adapters."""
        if self.policy is None:
            return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        first = self.rank if isinstance(self.rank, int) else self.rank[0]
        return ChainOptimizer(
            torch.optim.AdamW,
            model,
            self.policy(total_steps),
            link=LinkConfig(r=self.rank, lora_alpha=SCALING * first, target_modules=TARGETS),
            seed=seed,
            lr=lr,
            weight_decay=0.0,
        )


def _even(length: int) -> Callable[[int], KnotPolicy]:
    return lambda total_steps: EvenKnots(length=length, total_steps=total_steps)


def _plateau(total_steps: int) -> KnotPolicy:
    # a link is judged by means over a twelfth of the run and may miss one of them
    return PlateauKnots(window=max(1, total_steps // 12), patience=1, threshold=0.01, max_links=4)


_CHAIN_RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
_FULL_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)

ARMS = {
    arm.name: arm
    for arm in (
        Arm("lora", "LoRA", lambda total_steps: NeverKnots(), _CHAIN_RATES, recorded=8e-3),
        Arm("cola-2", "COLA, 2 links", _even(2), _CHAIN_RATES, recorded=8e-3),
        Arm("cola-3", "COLA, 3 links", _even(3), _CHAIN_RATES, recorded=8e-3),
        Arm("cola-plateau", "COLA, plateau", _plateau, _CHAIN_RATES, recorded=8e-3),
        Arm("cola-8-4", "COLA, ranks 8, 4", _even(2), _CHAIN_RATES, recorded=8e-3, rank=(8, 4)),
        Arm(
            "lora-24",
            "LoRA, rank 24",
            lambda total_steps: NeverKnots(),
            _CHAIN_RATES,
            recorded=8e-3,
            rank=24,
            control=True,
        ),
        Arm("full", "full fine-tuning", None, _FULL_RATES, recorded=1e-3),
    )
}
"""Name -> arm, in the order of the table. The order of the text and the seeds are the same for all."""

REFERENCE = "lora"
"""The arm that the others are compared with."""
CEILING = "full"
"""The arm whose distance from the reference is the gap to close."""
