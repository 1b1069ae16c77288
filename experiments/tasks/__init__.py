"""The paper's eleven tasks: their prompts, byte for byte, and the sources of their rows."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from experiments.tasks.choice import COPA, RECORD
from experiments.tasks.classification import BOOLQ, CB, MULTIRC, RTE, SST2, WIC, WSC
from experiments.tasks.generation import DROP, SQUAD
from experiments.tasks.samples import Kind, Row, Sample, Task

__all__ = ["TASKS", "Kind", "Row", "Sample", "Task", "key", "task"]

TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for task in (SST2, WSC, CB, WIC, BOOLQ, MULTIRC, RTE, DROP, SQUAD, COPA, RECORD)}
)
"""Name -> task, in the order and spelling of the paper's Table 1."""


def key(name: str) -> str:
    """`name` reduced to lower-case letters and digits, to compare spellings."""
    return "".join(character for character in name.lower() if character.isalnum())


def task(name: str) -> Task:
    """The task called `name`; case, hyphens, dots and spaces do not matter.

    Raises:
        ValueError: there is no such task; the message lists the names.

    Example:
        >>> task("sst2").name
        'SST-2'
    """
    for candidate in TASKS.values():
        if key(candidate.name) == key(name):
            return candidate
    raise ValueError(f"task={name!r} is none of {', '.join(TASKS)}")
