"""Outcomes of a sweep for TensorBoard: one run per cell, written once even if the sweep is resumed."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from experiments.sweep import Outcome, Sweep


class Board:
    """Writes outcomes below a folder; `tensorboard --logdir FOLDER` shows them.

    Numbers of an outcome become scalars, and lists of numbers (losses) become curves. Other values and numbers that are
    not finite are left out.

    Args:
        sweep: the sweep of the cells.
        folder: created if it does not exist.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """

    def __init__(self, sweep: Sweep[Any], folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("--tensorboard needs TensorBoard: pip install tensorboard") from error
        self._writer, self.sweep, self.folder = SummaryWriter, sweep, folder

    def __call__(self, cell: Any, outcome: Outcome) -> None:
        """Write one outcome, unless it is there already."""
        place = self.folder / self.sweep.place(cell).name
        if place.exists():
            return
        whole, place = place, place.with_name(f".{place.name}.{os.getpid()}")  # if killed, it is written again
        with self._writer(str(place)) as writer:
            for name, value in outcome.items():
                values = value if isinstance(value, list) else [value]
                if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
                    for step, number in enumerate(values, start=1):
                        if math.isfinite(number):
                            writer.add_scalar(name, number, step)
        place.replace(whole)
