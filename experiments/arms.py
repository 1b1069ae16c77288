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
class Adapters:
    """What the adapters of all arms share.

    Attributes:
        rank: of LoRA and of a chain's links; arms of other ranks keep their ratio to it.
        targets: names of the layers that get adapters, or `("all-linear",)`.
        init: how A is drawn, as in `cola.LinkConfig`.
    """

    rank: int = 8
    targets: tuple[str, ...] = tuple(TARGETS)
    init: str = "gaussian"

    def link(self, shares: tuple[float, ...]) -> LinkConfig:
        """A link's configuration for ranks of `shares` x `rank`."""
        ranks = self.ranks(shares)
        return LinkConfig(
            r=ranks if len(ranks) > 1 else ranks[0],
            lora_alpha=SCALING * ranks[0],
            target_modules="all-linear" if self.targets == ("all-linear",) else list(self.targets),
            init=self.init,
        )

    def ranks(self, shares: tuple[float, ...]) -> tuple[int, ...]:
        """`shares` x `rank`, at least 1 each."""
        return tuple(max(1, round(self.rank * share)) if self.rank > 0 else self.rank for share in shares)


@dataclass(frozen=True)
class Arm:
    """One method.

    Attributes:
        name: as on the command line and in the results.
        label: as in the table and the plot; `{ranks}` in it becomes the ranks.
        policy: total steps of the run -> when to tie; None trains all weights with the plain base optimizer.
        rates: AdamW's peak learning rates for the whole grid, rising.
        recorded: the best rate so far by validation loss (RESULTS.md); a default run tries it and its neighbours.
        shares: ranks of the links relative to `Adapters.rank`: one number for all, or one per link.
        control: True for an arm of the whole comparison only.
    """

    name: str
    label: str
    policy: Callable[[int], KnotPolicy] | None
    rates: tuple[float, ...]
    recorded: float
    shares: tuple[float, ...] = (1.0,)
    control: bool = False

    def __post_init__(self) -> None:
        if self.recorded not in self.rates:
            raise ValueError(f"{self.name}: recorded={self.recorded} is not among rates={self.rates}")

    def nearby(self, count: int) -> tuple[float, ...]:
        """The `count` rates of the grid nearest to the recorded one, the higher where two are as near."""
        at = self.rates.index(self.recorded)
        order = sorted(range(len(self.rates)), key=lambda index: (abs(index - at), -index))
        return tuple(self.rates[index] for index in sorted(order[:count]))

    def title(self, adapters: Adapters) -> str:
        """The label, with the ranks that the links have."""
        return self.label.format(ranks=", ".join(map(str, adapters.ranks(self.shares))))

    def optimizer(
        self, model: nn.Module, adapters: Adapters, *, lr: float, seed: int, total_steps: int
    ) -> torch.optim.Optimizer:
        """AdamW without weight decay on what this arm trains, in a `ChainOptimizer` for adapters."""
        if self.policy is None:
            return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        return ChainOptimizer(
            torch.optim.AdamW,
            model,
            self.policy(total_steps),
            link=adapters.link(self.shares),
            seed=seed,
            lr=lr,
            weight_decay=0.0,
        )


def _even(length: int) -> Callable[[int], KnotPolicy]:
    return lambda total_steps: EvenKnots(length=length, total_steps=total_steps)


def _plateau(total_steps: int) -> KnotPolicy:
    # a link is judged by means over a twelfth of the run and may miss one of them
    return PlateauKnots(window=max(1, total_steps // 12), patience=1, threshold=0.01, max_links=4)


_CHAIN_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
_FULL_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)

ARMS = {
    arm.name: arm
    for arm in (
        Arm("lora", "LoRA", lambda total_steps: NeverKnots(), _CHAIN_RATES, recorded=8e-3),
        Arm("cola-2", "COLA, 2 links", _even(2), _CHAIN_RATES, recorded=4e-3),
        Arm("cola-3", "COLA, 3 links", _even(3), _CHAIN_RATES, recorded=4e-3),
        Arm("cola-plateau", "COLA, plateau", _plateau, _CHAIN_RATES, recorded=4e-3),
        Arm("cola-stepdown", "COLA, ranks {ranks}", _even(2), _CHAIN_RATES, recorded=4e-3, shares=(1, 0.5)),
        Arm(
            "lora-wide",
            "LoRA, rank {ranks}",
            lambda total_steps: NeverKnots(),
            _CHAIN_RATES,
            recorded=8e-3,
            shares=(3,),
            control=True,
        ),
        Arm("full", "full fine-tuning", None, _FULL_RATES, recorded=5e-4),
    )
}
"""Name -> arm, in the order of the table. The order of the text and the seeds are the same for all."""

REFERENCE = "lora"
"""The arm that the others are compared with."""
CEILING = "full"
"""The arm whose distance from the reference is the gap to close."""
