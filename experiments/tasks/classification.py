"""The seven tasks whose candidates are label words: a template, and a word for every label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from experiments.tasks.samples import Kind, Row, Sample, Task, label_index


def _label(row: Row) -> int:
    return row["label"]


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """A prompt made from the row's fields, followed by one of `words`.

    Attributes:
        template: the prompt, with the names of fields in braces.
        words: the label words in the order of the labels.
        before: the text between prompt and word.
        null: the prompt for calibration.
        prepare: changes fields before they enter the template.
        label: the label of a row.
    """

    kind: ClassVar[Kind] = "classification"
    template: str
    words: tuple[str, ...]
    before: str = ""
    null: str = ""
    prepare: Mapping[str, Callable[[str], str]] = field(default_factory=dict)
    label: Callable[[Row], int] = _label

    def _sample(self, row: Row) -> Sample:
        gold = label_index(self.name, self.label(row), self.words)
        fields = {name: row[name] for name, kind in self.required.items() if kind is str}
        for name, change in self.prepare.items():
            fields[name] = change(fields[name])
        return Sample(fields, candidates=self.words, gold=(gold,))

    def prompt(self, sample: Sample) -> str:
        """The filled template."""
        return self.template.format_map(sample.fields)

    def full(self, sample: Sample, candidate: str) -> str:
        """The filled template and the label word."""
        return self.prompt(sample) + self.before + candidate

    def null_prompt(self, sample: Sample) -> str:
        """`null`."""
        return self.null

    def null_full(self, sample: Sample, candidate: str) -> str:
        """`null` and the label word."""
        return self.null + self.before + candidate


def as_question(text: str) -> str:
    """`text` with its first character in upper case and a question mark at its end."""
    text = text if text.endswith("?") else text + "?"
    return text[0].upper() + text[1:]


def _texts(*names: str) -> dict[str, type]:
    return {**dict.fromkeys(names, str), "label": int}


SST2 = Classification(
    name="SST-2",
    hub=("nyu-mll/glue", "sst2"),
    required=_texts("sentence"),
    template="{sentence} It was",
    words=("terrible", "great"),
    before=" ",
    null=" It was",
    prepare={"sentence": str.strip},
)

WSC = Classification(
    name="WSC",
    hub=("aps/super_glue", "wsc.fixed"),
    required=_texts("text", "span1_text", "span2_text"),
    template='{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n',
    words=("No", "Yes"),
    prepare={"span2_text": str.lower},
)

CB = Classification(
    name="CB",
    hub=("aps/super_glue", "cb"),
    required=_texts("premise", "hypothesis"),
    template='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
    words=("Yes", "No", "Maybe"),
    dev=100,
)

WIC = Classification(
    name="WIC",
    hub=("aps/super_glue", "wic"),
    required=_texts("word", "sentence1", "sentence2"),
    template=(
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n'
    ),
    words=("No", "Yes"),
)

BOOLQ = Classification(
    name="BoolQ",
    hub=("google/boolq", None),
    required={"passage": str, "question": str, "answer": bool},
    template="{passage} {question}\n",
    words=("Yes", "No"),
    prepare={"question": as_question},
    label=lambda row: 0 if row["answer"] else 1,
)

MULTIRC = Classification(
    name="MultiRC",
    hub=("aps/super_glue", "multirc"),
    required=_texts("paragraph", "question", "answer"),
    template='{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
    words=("No", "Yes"),
    micro_batch=2,
)

RTE = Classification(
    name="RTE",
    hub=("aps/super_glue", "rte"),
    required=_texts("premise", "hypothesis"),
    template='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
    words=("Yes", "No"),
)
