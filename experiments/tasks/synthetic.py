"""Made-up rows in the format of the eleven tasks, to try every command without data.

The rows are small and follow one simple rule per task. Scores on them say nothing about any method, and a folder of
them has a file that says so.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

NOTICE = "SYNTHETIC.txt"
"""The file that marks a folder of made-up rows."""

_SPLITS = ("train", "validation")
_NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn")
_THINGS = ("bank", "bat", "seal", "ring", "bow", "pen")
_COLOURS = ("red", "blue", "green", "grey")


def write(folder: Path, tasks: Iterable[str], train: int, validation: int, seed: int = 0) -> None:
    """Write `<folder>/<task>/train.jsonl` and `validation.jsonl`.

    Args:
        folder: created if it does not exist.
        tasks: keys of `ROWS`.
        train, validation: rows.
        seed: of the generator; the same seed gives the same bytes.

    Raises:
        ValueError: a task without a generator, or a number of rows below one.
    """
    if min(train, validation) < 1:
        raise ValueError(f"train={train}, validation={validation}: at least one row each is needed")
    for task in tasks:
        if task not in ROWS:
            raise ValueError(f"task={task!r}: rows can be made up for {', '.join(ROWS)}")
        place = folder / task
        place.mkdir(parents=True, exist_ok=True)
        for split, count in zip(_SPLITS, (train, validation)):
            draw = random.Random(f"{task}-{split}-{seed}")
            lines = [json.dumps({**ROWS[task](draw, index), "idx": index}) for index in range(count)]
            _write(place / f"{split}.jsonl", "\n".join(lines) + "\n")
    _write(folder / NOTICE, "Made-up rows, to try commands with. Scores on them mean nothing.\n")


def _write(path: Path, text: str) -> None:
    """Write a file, unless it is there already: another process may be reading it."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _sst2(draw: random.Random, index: int) -> dict[str, Any]:
    label = index % 2
    return {"sentence": f"a {draw.choice(('dull', 'bright')[label::2])} film ", "label": label}


def _entailment(draw: random.Random, labels: int, index: int) -> dict[str, Any]:
    """Label 0: the premise; 1: the contrary, or not entailed; 2: something else."""
    label = index % labels
    name, other = draw.sample(_NAMES, 2)
    colour, thing = draw.choice(_COLOURS), draw.choice(_THINGS)
    claims = (f"{name} has a {colour} {thing}.", f"{name} has no {thing}.", f"{other} has a {thing}.")
    return {"premise": f"{name} has a {colour} {thing}.", "hypothesis": claims[label], "label": label}


def _boolq(draw: random.Random, index: int) -> dict[str, Any]:
    answer = index % 2 == 0
    colour, other = draw.sample(_COLOURS, 2)
    thing = draw.choice(_THINGS)
    asked = colour if answer else other
    return {"passage": f"The {thing} is {colour}.", "question": f"is the {thing} {asked}", "answer": answer}


def _wsc(draw: random.Random, index: int) -> dict[str, Any]:
    label = index % 2
    name, other = draw.sample(_NAMES, 2)
    return {
        "text": f"{name} called {other} because she was late.",
        "span1_index": 0 if label else 2,
        "span2_index": 4,
        "span1_text": name if label else other,
        "span2_text": "she",
        "label": label,
    }


def _wic(draw: random.Random, index: int) -> dict[str, Any]:
    label = index % 2
    word, (name, other) = draw.choice(_THINGS), draw.sample(_NAMES, 2)
    return {
        "word": word,
        "sentence1": f"{name} saw a {word}.",
        "sentence2": f"{other} saw a {word}." if label else f"They {word} and leave.",
        "label": label,
    }


def _multirc(draw: random.Random, index: int) -> dict[str, Any]:
    label = index % 2
    name, other = draw.sample(_NAMES, 2)
    thing = draw.choice(_THINGS)
    return {
        "paragraph": f"{name} has the {thing}.",
        "question": f"Who has the {thing}?",
        "answer": name if label else other,
        "label": label,
    }


def _copa(draw: random.Random, index: int) -> dict[str, Any]:
    label = index % 2
    name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    choices = [f"{name} lost it.", f"{name} found it."]
    return {
        "premise": f"{name} {('is sad', 'is glad')[label]} about the {thing}.",
        "choice1": choices[0],
        "choice2": choices[1],
        "question": ("cause", "effect")[index // 2 % 2],
        "label": label,
    }


def _record(draw: random.Random, index: int) -> dict[str, Any]:
    names = draw.sample(_NAMES, 2 + index % 2)
    thing = draw.choice(_THINGS)
    return {
        "passage": f"{names[0]} has a {thing}.\n@highlight\n{' and '.join(names[1:])} came.",
        "query": f"The {thing} is @placeholder's.",
        "entities": sorted(names),
        "answers": [names[0]],
    }


def _squad(draw: random.Random, index: int) -> dict[str, Any]:
    name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    context = f"{name} has the {thing}."
    return {
        "id": str(index),
        "title": thing.title(),
        "context": context,
        "question": f"Who has the {thing}?",
        "answers": {"text": [name], "answer_start": [0]},
    }


def _drop(draw: random.Random, index: int) -> dict[str, Any]:
    name, thing, count = draw.choice(_NAMES), draw.choice(_THINGS), draw.randint(2, 9)
    return {
        "section_id": str(index),
        "query_id": str(index),
        "passage": f"{name} has {count} {thing}s.",
        "question": f"How many {thing}s?",
        "answers_spans": {"spans": [str(count)], "types": ["number"]},
    }


ROWS: Mapping[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "sst2": _sst2,
    "wsc": _wsc,
    "cb": lambda draw, index: _entailment(draw, 3, index),
    "wic": _wic,
    "boolq": _boolq,
    "multirc": _multirc,
    "rte": lambda draw, index: _entailment(draw, 2, index),
    "drop": _drop,
    "squad": _squad,
    "copa": _copa,
    "record": _record,
}
"""Task -> one row, given a generator and the row's number."""
