"""The control: a short run in which rank does not bind, so every chain loses to one LoRA.

`python -m experiments study --control`: three epochs of English prose on a tiny OPT that knows code, adapters of rank 8
on query and value. Every epoch cuts the text elsewhere; the rate falls late and rises anew after every knot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.methods import Method
from experiments.study.arms import Arm
from experiments.study.setting import Setting
from experiments.tiny import tiny_opt

SCALING = 2.0
"""s of W + s·B A for every link: the paper's lora_alpha / r = 16 / 8, kept when the rank changes."""


def preset(**changes: Any) -> Setting:
    """The control's setting, with changes to its fields."""
    setting = Setting(
        str(tiny_opt.COMMITTED), epochs=3, held_out=None, batch_size=2, train_bytes=36_864, warmup=15, decay=0.5,
        by_epoch=False, keep_chains=True,
    )  # fmt: skip
    return dataclasses.replace(setting, **changes)


def arms(rank: int = 8) -> Mapping[str, Arm]:
    """The control's arms, name -> arm in the order of the table.

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
