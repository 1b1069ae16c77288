"""What an arm of a comparison is, and the demo's arms; the study's are in `study.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from experiments.methods import Method

SCALING = 2.0
"""s of W + s·B·A for every link of the demo: the paper's lora_alpha / r = 16 / 8, kept when the rank changes."""


@dataclass(frozen=True)
class Arm:
    """A method with its label and its rates.

    Attributes:
        label: as in tables and plots.
        method: what is trained, and when it ties a knot.
        rates: peak learning rates to choose from, rising.
        start: of these the one that a search begins with; the demo's is the best so far (RESULTS.md).
    """

    label: str
    method: Method
    rates: tuple[float, ...]
    start: float

    def __post_init__(self) -> None:
        if self.start not in self.rates:
            raise ValueError(f"{self.label}: start={self.start} is not among rates={self.rates}")

    def nearby(self, count: int) -> tuple[float, ...]:
        """The `count` rates of the grid nearest to the start, the higher where two are as near."""
        at = self.rates.index(self.start)
        order = sorted(range(len(self.rates)), key=lambda index: (abs(index - at), -index))
        return tuple(self.rates[index] for index in sorted(order[:count]))


def demo(rank: int = 8) -> dict[str, Arm]:
    """The demo's arms, name -> arm in the order of the table, with links of `rank` where the arm says no other.

    Raises:
        ValueError: `rank` is not a rank.
    """

    def adapters(label: str, start: float, *ranks: int, **more: Any) -> Arm:
        method = Method("cola" if more else "lora", ranks=ranks, alpha=SCALING * ranks[0], **more)
        return Arm(label, method, (2e-3, 4e-3, 8e-3, 1.6e-2), start)

    half = max(1, round(rank / 2))
    return {
        "lora": adapters("LoRA", 8e-3, rank),
        "cola-2": adapters("COLA, 2 links", 4e-3, rank, links=2, knots="even"),
        "cola-3": adapters("COLA, 3 links", 4e-3, rank, links=3, knots="even"),
        "cola-plateau": adapters("COLA, plateau", 4e-3, rank, links=4, knots="plateau"),
        "cola-stepdown": adapters(f"COLA, ranks {rank}, {half}", 4e-3, rank, half, links=2, knots="even"),
        "lora-wide": adapters(f"LoRA, rank {3 * rank}", 8e-3, 3 * rank),
        "full": Arm("full fine-tuning", Method("finetune"), (2.5e-4, 5e-4, 1e-3, 2e-3), 5e-4),
    }


def require_possible(arms: Mapping[str, Arm], model: nn.Module, set_up: Callable[[Arm, nn.Module], object]) -> None:
    """Set every arm up once, before anything is run or written.

    Args:
        arms: name -> arm.
        model: untouched, and left so.
        set_up: arm, a copy of the model -> its optimizer; a ValueError says that the arm cannot be.

    Raises:
        ValueError: the message names the arms that cannot be, why (rank, layer, shape), and those that are left.
    """
    refused = {}
    for name, arm in arms.items():
        try:
            set_up(arm, copy.deepcopy(model))
        except ValueError as error:
            refused[name] = error
    if refused:
        reasons = "".join(f"\n  arm {name} ({arms[name].label}): {error}" for name, error in refused.items())
        left = " ".join(name for name in arms if name not in refused)
        advice = f"leave out what cannot be: --arms {left}" if left else "choose other --arms"
        raise ValueError(f"nothing was run, because of{reasons}\n{advice}")


DEMO = tuple(demo())
"""The names of the demo's arms."""
CONTROL = "lora-wide"
"""The arm of the demo's whole comparison only."""
REFERENCE = "lora"
"""The arm that the others are compared with."""
CEILING = "full"
"""The arm whose distance from the reference is the gap to close."""
