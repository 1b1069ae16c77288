"""The paper's numbers as data: eight tables and the protocol, read from `paper.json`.

Columns are tasks, named as in `experiments.tasks`. Scores are percentages (accuracy, or F1 for SQuAD and DROP); higher
is better. A number that the paper does not print is None, never a guess.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Score:
    """One number of a table.

    Attributes:
        mean: over the paper's five seeds, in percent.
        std: the standard deviation, where the paper prints it (Table 3).
        flops_saved: training FLOPs saved against LoRA of rank 8, where the paper prints them (Table 4).
    """

    mean: float
    std: float | None = None
    flops_saved: float | None = None


@dataclass(frozen=True)
class Published:
    """One table of the paper.

    Attributes:
        number: 1 to 8.
        title: of the table.
        model: with these scores.
        note: a remark needed to read the table, or None.
        columns: tasks.
        rows: label -> task -> score, without tasks that the row lacks.
    """

    number: int
    title: str
    model: str
    note: str | None
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Score]]

    def score(self, row: str, task: str) -> Score | None:
        """The paper's score; None if it prints none for this row and task."""
        return self.rows.get(row, {}).get(task)


@dataclass(frozen=True)
class Protocol:
    """How the paper trains and chooses.

    Attributes:
        train, dev, test: examples per task, fewer where a task has fewer.
        epochs: of a whole run, all links together.
        seeds: runs per score.
        schedule: of the learning rate.
        optimizer: the base optimizer where a table names none.
        batch: model -> examples per step.
        rank, lora_alpha, targets: of the adapters.
        adapter_bias: model -> whether the adapted layers' bias is trained.
        rates: grids of learning rates, see `grid`.
        selection: how a rate is chosen.
        hardware: of the paper.
    """

    train: int
    dev: int
    test: int
    epochs: int
    seeds: int
    schedule: str
    optimizer: str
    batch: Mapping[str, int]
    rank: int
    lora_alpha: int
    targets: tuple[str, ...]
    adapter_bias: Mapping[str, bool]
    rates: Mapping[str, tuple[float, ...]]
    selection: str
    hardware: str

    def grid(self, *, adapters: bool, optimizer: str = "AdamW", model: str = "OPT-1.3B") -> tuple[float, ...]:
        """The learning rates that the paper chooses from, rising.

        Args:
            adapters: True for LoRA and COLA, whose grid depends on the optimizer; False for full fine-tuning, whose
                grid depends on the model.
            optimizer: AdamW, SGD or AdaGrad.
            model: OPT-1.3B or Llama-2-7B.

        Raises:
            KeyError: the paper has no such grid.
        """
        name = f"adapters, {optimizer}" if adapters else f"full, {model}"
        if name not in self.rates:
            raise KeyError(f"{name!r}: the paper's grids are {', '.join(self.rates)}")
        return self.rates[name]


def published(number: int) -> Published:
    """The paper's table `number`.

    Raises:
        KeyError: the paper has no such table.

    Example:
        >>> published(3).score("length 2", "wsc")
        Score(mean=59.81, std=4.1, flops_saved=None)
        >>> published(3).score("length 2", "drop") is None
        True
    """
    tables = _tables()
    if number not in tables:
        raise KeyError(f"number={number}: the paper's tables are {', '.join(map(str, tables))}")
    return tables[number]


@functools.cache
def protocol() -> Protocol:
    """The paper's protocol."""
    facts = dict(_facts()["protocol"])
    facts["targets"] = tuple(facts["targets"])
    facts["rates"] = MappingProxyType({name: tuple(rates) for name, rates in facts["rates"].items()})
    for name in ("batch", "adapter_bias"):
        facts[name] = MappingProxyType(facts[name])
    return Protocol(**facts)


@functools.cache
def _tables() -> Mapping[int, Published]:
    return MappingProxyType({int(number): _table(int(number), facts) for number, facts in _facts()["tables"].items()})


def _table(number: int, facts: Mapping[str, Any]) -> Published:
    columns = tuple(facts["columns"])
    rows = {
        label: MappingProxyType(
            {
                task: Score(mean, std, saved)
                for task, mean, std, saved in zip(
                    columns, row["mean"], row.get("std", [None] * len(columns)),
                    row.get("flops_saved", [None] * len(columns)), strict=True,
                )
                if mean is not None
            }
        )
        for label, row in facts["rows"].items()
    }  # fmt: skip
    return Published(number, facts["title"], facts["model"], facts["note"], columns, MappingProxyType(rows))


@functools.cache
def _facts() -> dict[str, Any]:
    return json.loads((Path(__file__).parents[1] / "paper.json").read_text())
