"""The two tasks whose candidates are texts of the row: COPA and ReCoRD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from experiments.tasks.samples import Kind, Row, Sample, Task, label_index

_CONJUNCTION = {"effect": "so", "cause": "because"}


@dataclass(frozen=True, kw_only=True)
class Copa(Task):
    """Which of two sentences is the cause or the effect of a premise."""

    kind: ClassVar[Kind] = "choice"

    def _sample(self, row: Row) -> Sample:
        gold = label_index(self.name, row["label"], ("choice1", "choice2"))
        if row["question"] not in _CONJUNCTION:
            raise ValueError(f"{self.name}: question={row['question']!r} is none of {', '.join(_CONJUNCTION)}")
        fields = {"premise": row["premise"], "question": row["question"]}
        return Sample(fields, candidates=(row["choice1"], row["choice2"]), gold=(gold,))

    def prompt(self, sample: Sample) -> str:
        """The premise without its full stop, and the conjunction."""
        premise = sample.fields["premise"].rstrip().removesuffix(".")
        return f"{premise} {_CONJUNCTION[sample.fields['question']]} "

    def full(self, sample: Sample, candidate: str) -> str:
        """The premise continued by the candidate."""
        return self.prompt(sample) + _continued(candidate)

    def null_prompt(self, sample: Sample) -> str:
        """The conjunction."""
        return _CONJUNCTION[sample.fields["question"]]

    def null_full(self, sample: Sample, candidate: str) -> str:
        """The conjunction and the candidate."""
        return f"{self.null_prompt(sample)} {_continued(candidate)}"


def _continued(sentence: str) -> str:
    """`sentence` for the middle of another one: its first word in lower case, unless it is `I`."""
    first, space, rest = sentence.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


@dataclass(frozen=True, kw_only=True)
class Record(Task):
    """Which of a passage's entities fills the gap in a sentence; the filled sentence is the option."""

    kind: ClassVar[Kind] = "choice"

    def _sample(self, row: Row) -> Sample:
        entities = tuple(row["entities"])
        strangers = [answer for answer in row["answers"] if answer not in entities]
        if strangers or not row["answers"]:
            raise ValueError(f"{self.name}: answers={row['answers']!r} must be one or more of {list(entities)!r}")
        gold = tuple(entities.index(answer) for answer in row["answers"])
        return Sample({"passage": row["passage"], "query": row["query"]}, candidates=entities, gold=gold)

    def prompt(self, sample: Sample) -> str:
        """The passage with its highlights as a list, and the dash of one more item."""
        passage = sample.fields["passage"].replace("@highlight\n", "- ")
        return f"{passage}\n-"

    def full(self, sample: Sample, candidate: str) -> str:
        """That list with the filled sentence as its last item."""
        return f"{self.prompt(sample)} {_filled(sample, candidate)}"

    def null_prompt(self, sample: Sample) -> str:
        """The dash of an item."""
        return "-"

    def null_full(self, sample: Sample, candidate: str) -> str:
        """The filled sentence as an item."""
        return f"- {_filled(sample, candidate)}"


def _filled(sample: Sample, entity: str) -> str:
    return sample.fields["query"].replace("@placeholder", entity)


COPA = Copa(
    name="COPA",
    hub=("aps/super_glue", "copa"),
    required={"premise": str, "choice1": str, "choice2": str, "question": str, "label": int},
    dev=100,
)

RECORD = Record(
    name="ReCoRD",
    hub=("aps/super_glue", "record"),
    required={"passage": str, "query": str, "entities": list, "answers": list},
    micro_batch=2,
)
