"""The two tasks whose answer is generated: DROP and SQuAD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from experiments.tasks.samples import Kind, Row, Sample, Task


@dataclass(frozen=True, kw_only=True)
class Generation(Task):
    """A question about a passage. The answer ends with a newline, which training includes and which ends generation.

    Attributes:
        template: the prompt, with the names of fields in braces.
        answers: the field with the answers, and the name of their list inside it.
    """

    kind: ClassVar[Kind] = "generation"
    metric: ClassVar[Literal["accuracy", "f1"]] = "f1"
    template: str
    answers: tuple[str, str]

    def _sample(self, row: Row) -> Sample:
        outer, inner = self.answers
        answers = row[outer].get(inner)
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"{self.name}: {outer}[{inner!r}]={answers!r} must be a list of one or more texts")
        fields = {name: row[name] for name, kind in self.required.items() if kind is str}
        fields["question"] = fields["question"].strip()
        return Sample(fields, answers=tuple(answers))

    def prompt(self, sample: Sample) -> str:
        """The filled template."""
        return self.template.format_map(sample.fields)

    def full(self, sample: Sample, candidate: str) -> str:
        """The filled template and the answer, with its newline."""
        return f"{self.prompt(sample)} {candidate}\n"


DROP = Generation(
    name="DROP",
    hub=("ucinlp/drop", None),
    required={"passage": str, "question": str, "answers_spans": dict},
    template="Passage: {passage}\nQuestion: {question}\nAnswer:",
    answers=("answers_spans", "spans"),
    micro_batch=1,
)

SQUAD = Generation(
    name="SQuAD",
    hub=("rajpurkar/squad", None),
    required={"title": str, "context": str, "question": str, "answers": dict},
    template="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
    answers=("answers", "text"),
)
