"""The arms that are compared, each a method with its learning rates: the study's and the demo's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from experiments.methods import Method


@dataclass(frozen=True)
class Arm:
    """A method with its label and its rates.

    Attributes:
        label: as in tables and plots.
        method: how the model is trained, and when a knot is tied.
        rates: peak learning rates to choose from, rising.
        start: the rate with which a search begins; for the demo the best so far (RESULTS.md).
    """

    label: str
    method: Method
    rates: tuple[float, ...]
    start: float

    def __post_init__(self) -> None:
        if self.start not in self.rates:
            raise ValueError(f"{self.label}: start={self.start} is not among rates={self.rates}")

    def nearby(self, count: int) -> tuple[float, ...]:
        """The `count` rates of the grid nearest to the start, the higher of two that are equally near."""
        at = self.rates.index(self.start)
        order = sorted(range(len(self.rates)), key=lambda index: (abs(index - at), -index))
        return tuple(self.rates[index] for index in sorted(order[:count]))


def _doubling(first: float, count: int) -> tuple[float, ...]:
    return tuple(first * 2**i for i in range(count))


_ADAM = _doubling(2.5e-4, 9)
_ADAGRAD = _doubling(1e-3, 9)
_SGD = _doubling(0.0125, 12)
_FULL = _doubling(6.25e-5, 8)


def _adam(label: str, method: Method) -> Arm:
    return Arm(label, method, _ADAM, 8e-3)


STUDY: Mapping[str, Arm] = {
    "lora": _adam("LoRA", Method.lora()),
    "cola-2": _adam("COLA, 2 links", Method.cola(2)),
    "cola-3": _adam("COLA, 3 links", Method.cola(3)),
    "cola-5": _adam("COLA, 5 links", Method.cola(5)),
    "cola-plateau": _adam("COLA, plateau", Method.cola(5, knots="plateau")),
    "cola-stepdown": _adam("COLA, ranks 8, 4", Method.cola(2, ranks=(8, 4))),
    "full": Arm("full fine-tuning", Method("finetune"), _FULL, 1e-3),
    "lora-24": _adam("LoRA, rank 24 = 3·8", Method.lora(24)),
    "lora-40": _adam("LoRA, rank 40 = 5·8", Method.lora(40)),
    "lora-16": _adam("LoRA, rank 16 = 2·8", Method.lora(16)),
    "cola-3-16": _adam("COLA, 3 links, rank 16", Method.cola(3, ranks=(16,))),
    "lora-32": _adam("LoRA, rank 32", Method.lora(32)),
    "cola-3-32": _adam("COLA, 3 links, rank 32", Method.cola(3, ranks=(32,))),
    "sgd-lora": Arm("SGD LoRA", Method.lora(base="SGD"), _SGD, 0.1),
    "sgd-cola-3": Arm("SGD COLA, 3 links", Method.cola(3, base="SGD"), _SGD, 0.1),
    "adagrad-lora": Arm("Adagrad LoRA", Method.lora(base="Adagrad"), _ADAGRAD, 1.6e-2),
    "adagrad-cola-3": Arm("Adagrad COLA, 3 links", Method.cola(3, base="Adagrad"), _ADAGRAD, 1.6e-2),
}
"""The study's arms, name -> arm, in the order of the table."""

REFERENCES: Mapping[str, str] = {
    "cola-3-16": "lora-16",
    "cola-3-32": "lora-32",
    "sgd-cola-3": "sgd-lora",
    "adagrad-cola-3": "adagrad-lora",
}
"""Arm -> the arm it is compared with, of the same rank and base optimizer; all others are compared with `REFERENCE`."""

REFERENCE = "lora"
CEILING = "full"
"""The arm whose distance from `REFERENCE` is the gap to close."""
CONTROL = "lora-wide"
"""The arm that the demo runs only with --full."""

SCALING = 2.0
"""s of W + s·B·A for every link of the demo: the paper's lora_alpha / r = 16 / 8, kept when the rank changes."""


def demo(rank: int = 8) -> dict[str, Arm]:
    """The demo's arms, name -> arm in the order of the table.

    Args:
        rank: of every link, unless the arm says otherwise.

    Raises:
        ValueError: `rank` is below 1.
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


DEMO = tuple(demo())
"""The names of the demo's arms."""


def require_possible(arms: Mapping[str, Arm], model: nn.Module, set_up: Callable[[Arm, nn.Module], object]) -> None:
    """Set every arm up once, before anything is run or written.

    Args:
        arms: name -> arm.
        model: untouched, and left so.
        set_up: arm, a copy of the model -> its optimizer; raises a ValueError if the arm is impossible.

    Raises:
        ValueError: the message names the impossible arms, why (rank, layer, shape), and the arms that are left.
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
        advice = f"leave out these arms: --arms {left}" if left else "choose other --arms"
        raise ValueError(f"nothing was run, because of{reasons}\n{advice}")
