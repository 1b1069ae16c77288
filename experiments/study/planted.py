"""A planted task: one linear layer learns a teacher's update whose singular values fall as i^−p.

With a slow spectrum (p = ½) rank binds, and every new direction holds signal. With a steep one (p = 1.5) the first few
directions hold nearly all of it, and later links fit noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from experiments.study.text import Blocks
from experiments.study.training import WarmDecay

HELD_OUT = 2000
"""Examples per held-out split."""


class Student(nn.Module):
    """``y = W x`` with W = 0 at first. An example is a row (x, noise), and the label is ``(U Σ Vᵀ) x + noise``."""

    teacher: torch.Tensor

    def __init__(self, teacher: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(teacher.shape[1], teacher.shape[0], bias=False)
        nn.init.zeros_(self.layer.weight)
        self.register_buffer("teacher", teacher, persistent=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        """An output with the mean squared error per coordinate as its ``loss``.

        Args:
            input_ids: examples, n × 2·width.
            labels: unused; the teacher knows them.
        """
        x, noise = input_ids.chunk(2, dim=1)
        residual = self.layer(x) - x @ self.teacher.t() - noise
        return SimpleNamespace(loss=residual.square().mean())


@dataclass(frozen=True)
class Planted:
    """The part of a run on a planted task that all arms share; it takes the place of a `Setting`.

    Attributes:
        power: p of the spectrum i^−p, whose squares sum to the width.
        steps_per_run: optimizer steps.
        examples: training examples; an epoch is a pass over them.
        noise: standard deviation of the labels' noise.
        width: of the layer.
        batch_size: examples per step.
    """

    power: float = 0.5
    steps_per_run: int = 1500
    examples: int = 4000
    noise: float = 1.0
    width: int = 64
    batch_size: int = 32

    targets = ("layer",)
    by_epoch = False
    keep_chains = False
    unit = "squared error"
    per_nat = 1.0
    epochs = 1

    def load(self) -> nn.Module:
        """The untouched student, with the task's teacher."""
        draw = torch.Generator().manual_seed(1)
        u, v = (torch.linalg.qr(torch.randn(self.width, self.width, generator=draw))[0] for _ in range(2))
        values = torch.arange(1, self.width + 1.0) ** -self.power
        return Student((u * values * math.sqrt(self.width / values.square().sum())) @ v)

    def blocks(self) -> Blocks:
        """The examples of each split."""
        draw = torch.Generator().manual_seed(2)
        sizes = self.examples, HELD_OUT, HELD_OUT
        rows = [torch.randn(size, 2 * self.width, generator=draw) for size in sizes]
        for part in rows:
            part[:, self.width :] *= self.noise
        return Blocks(*rows)

    def steps(self) -> int:
        """Optimizer steps in a run."""
        return self.steps_per_run

    def steps_per_epoch(self) -> int:
        """All steps: a run counts as one epoch, however often it passes over the examples."""
        return self.steps_per_run

    def schedule(self) -> WarmDecay:
        """Linear decay."""
        return WarmDecay(self.steps_per_run)

    def read(self, seed: int) -> Iterator[Iterable[torch.Tensor]]:
        """The batches of a seed, as one epoch; each pass over the examples has its own order."""
        yield self._batches(seed)

    def _batches(self, seed: int) -> Iterator[torch.Tensor]:
        draw, rows = torch.Generator().manual_seed(seed), self.blocks().train
        left = self.steps_per_run
        while left:
            order = torch.randperm(len(rows), generator=draw)
            for chosen in order.split(self.batch_size)[:left]:
                yield rows[chosen]
            left = max(0, left - math.ceil(len(rows) / self.batch_size))
