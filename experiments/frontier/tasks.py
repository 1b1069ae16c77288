"""The tasks, by name: a model, a text and a length of run.

A chain can pay only where rank binds: where full fine-tuning is far below a LoRA, and more rank closes much of that gap.
`Gate` measures this. On ``prose`` and ``steep`` it does not hold; they are controls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from experiments.study import text
from experiments.study.planted import Planted
from experiments.study.setting import Setting

Task = Setting | Planted

_LINEAR = ("all-linear",)


def _text(epochs: int, blocks: int, context: int, batch: int, corpus: str, held_out: int | None) -> Setting:
    sizes = {"epochs": epochs, "train": blocks, "context": context, "batch_size": batch, "held_out": held_out}
    return Setting(corpus=corpus, targets=_LINEAR, by_epoch=False, **sizes)


TASKS: Mapping[str, Task] = {
    "demo": replace(_text(1, 18_400, 64, 8, text.CODE, 1000), model="tiny-prose"),
    "shakespeare": _text(5, 2400, 128, 8, "", 96),
    "code": _text(1, 32_000, 128, 8, text.CODE, 300),
    "prose": _text(5, 800, 256, 4, text.PROSE, 96),
    "slow": Planted(0.5),
    "steep": Planted(1.5),
}
"""``demo`` has its own model. ``shakespeare`` and ``code`` take a model by option, ``shakespeare`` its text too."""


def lasting(task: Task, steps: int) -> Task:
    """The task with runs of another length: text is cut to what they read, or read again from the start."""
    if isinstance(task, Planted):
        return replace(task, steps_per_run=steps)
    epochs = max(1, round(steps / (task.train // task.batch_size))) if task.epochs > 1 else 1
    return replace(task, epochs=epochs, train=steps * task.batch_size // epochs)


@dataclass(frozen=True)
class Gate:
    """Whether rank binds: the gap to full fine-tuning is large, and rank closes much of it.

    Attributes:
        gap: LoRA of rank r minus full fine-tuning, in nats (or the task's unit).
        closed: the share of it that LoRA of rank 3r closes.
    """

    gap: float
    closed: float

    LEAST_GAP = 0.1
    LEAST_CLOSED = 0.4

    @property
    def holds(self) -> bool:
        """Whether the task is one for chains."""
        return self.gap >= self.LEAST_GAP and self.closed >= self.LEAST_CLOSED

    def __str__(self) -> str:
        return (
            f"the gap to full fine-tuning is {self.gap:.3f}, of which three times the rank closes {self.closed:.0%}: "
            f"rank {'binds' if self.holds else 'does not bind'}"
        )
