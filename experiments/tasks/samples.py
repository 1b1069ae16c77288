"""The protocol of a task: a row becomes a sample, and a sample becomes the texts that a model sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Row = Mapping[str, Any]
"""One example as its data set stores it: field name -> value."""

Kind = Literal["classification", "choice", "generation"]
"""How a task is trained: over its candidates, or on the tokens of the right option or answer."""


@dataclass(frozen=True)
class Sample:
    """One example: the fields of its prompt, and the right answers.

    Attributes:
        fields: the texts of the prompt, by name.
        candidates: the options that are ranked; empty where the answer is generated.
        gold: indices of the right candidates; training uses the first, and any of them is right in evaluation.
        answers: the right answers of a generation task; training uses the first, and any of them is right.
    """

    fields: Mapping[str, str]
    candidates: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """The candidate or answer that training and demonstrations use."""
        return self.candidates[self.gold[0]] if self.candidates else self.answers[0]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One of the paper's tasks.

    The model sees `full`. `prompt` is its beginning without the option: it serves to measure the option's length and,
    where the answer is generated, as the model's input. Both are exact to the byte.

    Attributes:
        name: as the paper spells it.
        hub: path and configuration for `datasets.load_dataset`.
        required: the fields a row must have, each with its type.
        dev: how many training rows the protocol sets aside as the dev set.
        micro_batch: examples per forward pass in the protocol; the batch of eight is then accumulated.
        kind: how it is trained.
        metric: "accuracy" or "f1".
    """

    name: str
    hub: tuple[str, str | None]
    required: Mapping[str, type] = field(repr=False)
    dev: int = 500
    micro_batch: int = 8
    kind: ClassVar[Kind]
    metric: ClassVar[Literal["accuracy", "f1"]] = "accuracy"

    def sample(self, row: Row) -> Sample:
        """The sample that `row` describes.

        Raises:
            ValueError: a field is missing, has the wrong type, or holds a label that the task does not have.
        """
        for name, kind in self.required.items():
            if name not in row:
                raise ValueError(f"{self.name} needs the field {name!r} ({kind.__name__}); this row has {sorted(row)}")
            value = row[name]
            # isinstance(True, int) holds, but True is not a label
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise ValueError(f"{self.name}: {name}={value!r} is {type(value).__name__}, expected {kind.__name__}")
        return self._sample(row)

    @abstractmethod
    def _sample(self, row: Row) -> Sample:
        """The sample of a row with all its fields, of the right types."""

    @abstractmethod
    def prompt(self, sample: Sample) -> str:
        """The text in front of the option."""

    @abstractmethod
    def full(self, sample: Sample, candidate: str) -> str:
        """The text with `candidate`, one of the sample's candidates or answers, as its option."""

    def null_prompt(self, sample: Sample) -> str:
        """The prompt without its contents, for calibration."""
        raise NotImplementedError(f"{self.name} has no null prompt: generated answers cannot be calibrated")

    def null_full(self, sample: Sample, candidate: str) -> str:
        """`null_prompt` with `candidate` as its option."""
        raise NotImplementedError(f"{self.name} has no null prompt: generated answers cannot be calibrated")


def label_index(task: str, label: int, names: tuple[str, ...]) -> int:
    """`label`, checked to be one of 0, ..., len(names) - 1.

    Raises:
        ValueError: it is not. A label of -1 marks the rows of an unlabelled test split.
    """
    if not 0 <= label < len(names):
        meaning = ", ".join(f"{index} ({name})" for index, name in enumerate(names))
        hint = "; -1 marks the rows of a test split without labels" if label == -1 else ""
        raise ValueError(f"{task}: label={label} is none of {meaning}{hint}")
    return label
