"""The tasks, by name: a model, a text and a length of run.

A chain can pay only where rank binds: full fine-tuning is far below a LoRA, and more rank closes much of that gap.
`Gate` measures this. On ``prose`` and ``steep`` it does not hold; they are controls.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from experiments.study import text
from experiments.study.planted import Planted
from experiments.study.setting import Setting

Task = Setting | Planted

_LINEAR = ("all-linear",)


def _text(corpus: str, held_out: int, *, epochs: int = 1, blocks: int, context: int, batch: int = 8) -> Setting:
    return Setting(
        corpus=corpus, targets=_LINEAR, by_epoch=False, epochs=epochs, train=blocks, held_out=held_out, context=context,
        batch_size=batch,
    )  # fmt: skip


TASKS: Mapping[str, Task] = {
    "demo": replace(_text(text.CODE, 1000, blocks=18_400, context=64), model="tiny-prose"),
    "shakespeare": _text("", 96, epochs=5, blocks=2400, context=128),
    "code": _text(text.CODE, 300, blocks=32_000, context=128),
    "prose": _text(text.PROSE, 96, epochs=5, blocks=800, context=256, batch=4),
    "slow": Planted(0.5),
    "steep": Planted(1.5),
}
"""``demo`` has its own model. ``shakespeare`` and ``code`` take a model by option, ``shakespeare`` its text too."""


def room(task: Task) -> int | None:
    """How many training blocks the text of a task of several passes has; None for others, which need not know."""
    if isinstance(task, Planted) or task.epochs == 1:
        return None
    return len(replace(task, train=sys.maxsize).blocks().train)


def lasting(task: Task, steps: int, blocks: int | None = None) -> Task:
    """The task with runs of another length: more or fewer passes, and then over a longer or shorter part of the text.

    A task of several passes may take a few steps more than asked for.

    Args:
        task: the usual one.
        steps: in a run.
        blocks: `room(task)`, if it is known: a short text is then read in more passes.
    """
    if isinstance(task, Planted):
        return replace(task, steps_per_run=steps)
    epochs = max(1, round(steps / (task.train // task.batch_size))) if task.epochs > 1 else 1
    if blocks is not None:
        epochs = max(epochs, math.ceil(steps / max(1, blocks // task.batch_size)))
    return replace(task, epochs=epochs, train=math.ceil(steps / epochs) * task.batch_size)


def require_text(task: Task, steps: int) -> None:
    """Refuse a length for which the text is too short.

    Raises:
        ValueError: it ends earlier.
    """
    if (found := task.steps()) < steps:
        raise ValueError(f"--steps {steps}: the text ends after {found:,} steps; ask for at most so many")


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
