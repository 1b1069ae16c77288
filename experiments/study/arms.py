"""The arms that are compared, each a method with its learning rates; the study's are listed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from experiments.methods import Method


@dataclass(frozen=True)
class Arm:
    """A method with its label and its rates.

    Attributes:
        label: as in tables and plots.
        method: how the model is trained, and when a knot is tied.
        rates: peak learning rates to choose from, rising.
        start: the rate with which a search begins; for the demo the recorded best (RESULTS.md).
        reference: the name of the arm that it is compared with.
    """

    label: str
    method: Method
    rates: tuple[float, ...]
    start: float
    reference: str = "lora"

    def __post_init__(self) -> None:
        if self.start not in self.rates:
            raise ValueError(f"{self.label}: start={self.start} is not among rates={self.rates}")


def doubling(first: float, count: int) -> tuple[float, ...]:
    """A grid of rates by factors of two."""
    return tuple(first * 2**i for i in range(count))


_ADAM = doubling(2.5e-4, 9)
_ADAGRAD = doubling(1e-3, 9)
_SGD = doubling(0.0125, 12)
_FULL = doubling(6.25e-5, 8)


def _adam(label: str, method: Method, reference: str = "lora") -> Arm:
    return Arm(label, method, _ADAM, 8e-3, reference)


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
    "cola-3-16": _adam("COLA, 3 links, rank 16", Method.cola(3, ranks=(16,)), "lora-16"),
    "lora-32": _adam("LoRA, rank 32", Method.lora(32)),
    "cola-3-32": _adam("COLA, 3 links, rank 32", Method.cola(3, ranks=(32,)), "lora-32"),
    "sgd-lora": Arm("SGD LoRA", Method.lora(base="SGD"), _SGD, 0.1),
    "sgd-cola-3": Arm("SGD COLA, 3 links", Method.cola(3, base="SGD"), _SGD, 0.1, "sgd-lora"),
    "adagrad-lora": Arm("Adagrad LoRA", Method.lora(base="Adagrad"), _ADAGRAD, 1.6e-2),
    "adagrad-cola-3": Arm("Adagrad COLA, 3 links", Method.cola(3, base="Adagrad"), _ADAGRAD, 1.6e-2, "adagrad-lora"),
}
"""The study's arms, name -> arm, in the order of the table."""

REFERENCE = "lora"
CEILING = "full"
"""The arm whose distance from `REFERENCE` is the gap to close."""


def require_possible(
    arms: Mapping[str, Arm],
    model: nn.Module,
    set_up: Callable[[Arm, nn.Module], object],
    options: str = "--arms",
) -> None:
    """Set every arm up once, before anything is run or written.

    Args:
        arms: name -> arm.
        model: untouched, and left so.
        set_up: arm, a copy of the model -> its optimizer; raises a ValueError if the arm is impossible.
        options: of the command, by which its user chooses arms.

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
        named = left and options == "--arms"
        advice = f"leave out these arms: --arms {left}" if named else f"choose other {options}"
        raise ValueError(f"nothing was run, because of{reasons}\n{advice}")
