"""The text of the study: a corpus in three splits that do not overlap, as blocks of tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.tiny import corpus

PROSE = "prose"
CODE = "code"
"""The names of the texts that come with Python, `corpus.prose` and `corpus.code`; any other corpus is a file's path."""

_PASSAGE = 2000  # characters, of whole paragraphs
_EVERY = 10  # of ten passages in a row one is for development and one for the test


@dataclass(frozen=True)
class Blocks:
    """Blocks of tokens per split, int64, n × length."""

    train: torch.Tensor
    dev: torch.Tensor
    test: torch.Tensor


@functools.cache
def splits(source: str) -> Mapping[str, bytes]:
    """The ``train``, ``dev`` and ``test`` text of a corpus.

    Prose is split by topic, code by file, a corpus in one file as in `interleaved`.

    Args:
        source: `PROSE`, `CODE` or the path of a text file (UTF-8).

    Raises:
        FileNotFoundError: there is no such file.
    """
    if source == PROSE:
        prose = corpus.prose().text
        return {"train": prose["train"], "dev": prose["validation"], "test": prose["test"]}
    if source == CODE:
        train, *held_out = corpus.code_in_three()
        return dict(zip(("train", "dev", "test"), (train, *held_out)))
    return {split: part.encode() for split, part in interleaved(Path(source).read_text("utf-8")).items()}


@functools.cache
def blocks(source: str, tokenizer_of: str | None, length: int, train: int, held_out: int | None) -> Blocks:
    """The splits of a corpus, cut into consecutive blocks, of which as many as asked for are kept, evenly spread.

    Args:
        source: as in `splits`.
        tokenizer_of: folder or hub name of a tokenizer; None for bytes, where every block opens with `corpus.BOS`.
        length: tokens per block; a block of bytes has one more, `corpus.BOS`.
        train: training blocks to keep, at most.
        held_out: development and test blocks to keep, at most each; None for all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too short for one block per split.
    """
    parts, cut = splits(source), {}
    tokenizer = None if tokenizer_of is None else _tokenizer(tokenizer_of)
    for split, text in parts.items():
        if tokenizer is None:
            found = corpus.blocks(text, length)
        else:
            ids = torch.tensor(tokenizer(text.decode(), add_special_tokens=False, verbose=False)["input_ids"])
            count = len(ids) // length
            if count < 1:
                raise ValueError(f"{source}: its {split} split has {len(ids)} tokens, less than a block of {length}")
            found = ids[: count * length].view(count, length)
        cut[split] = spread(found, train if split == "train" else held_out)
    return Blocks(**cut)


def require(source: str) -> None:
    """Refuse a corpus that is not there, before anything is loaded.

    Raises:
        FileNotFoundError: it is not `PROSE`, `CODE` or the path of a file.
    """
    if source not in (PROSE, CODE) and not Path(source).is_file():
        raise FileNotFoundError(f"corpus={source!r}: there is no such file; give a text file in UTF-8, prose or code")


def interleaved(text: str) -> dict[str, str]:
    """A text in three splits, each spread over the whole of it.

    The text is cut into passages of whole paragraphs, about 2000 characters each. Of every ten passages the ninth is
    for ``dev``, the tenth for ``test`` and the rest for ``train``.

    >>> parts = interleaved("\\n\\n".join(f"{i} " + "x" * 1999 for i in range(20)))
    >>> [part.split()[0] for part in parts["dev"].split("\\n\\n")], len(parts["train"].split("\\n\\n"))
    (['8', '18'], 16)
    """
    passages: list[list[str]] = [[]]
    for paragraph in text.split("\n\n"):
        if sum(map(len, passages[-1])) >= _PASSAGE:
            passages.append([])
        passages[-1].append(paragraph)
    joined = ["\n\n".join(paragraphs) for paragraphs in passages]
    place = {_EVERY - 2: "dev", _EVERY - 1: "test"}
    dealt: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for index, passage in enumerate(joined):
        dealt[place.get(index % _EVERY, "train")].append(passage)
    return {split: "\n\n".join(kept) for split, kept in dealt.items()}


def spread(rows: torch.Tensor, count: int | None) -> torch.Tensor:
    """``count`` of the rows, evenly spread from the first to the last; all rows if there are no more, or for None.

    >>> spread(torch.arange(10), 4)
    tensor([0, 3, 6, 9])
    """
    if count is None or count >= len(rows):
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)
