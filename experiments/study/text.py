"""Text for the offline study: a corpus cut into three interleaved splits, as blocks of tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.tiny import corpus

PROSE = "prose"
"""The name of the text that comes with Python, `corpus.prose()`; any other corpus is a file's path."""

_PASSAGE = 2000  # characters, of whole paragraphs
_EVERY = 10  # of ten passages in a row one is for development and one for the test


@dataclass(frozen=True)
class Blocks:
    """Blocks of tokens, int64, n × length, per split, and how many of them may be trained on."""

    train: torch.Tensor
    dev: torch.Tensor
    test: torch.Tensor


@functools.cache
def blocks(source: str, tokenizer_of: str | None, length: int, train: int, held_out: int) -> Blocks:
    """The blocks of a corpus.

    Text is cut into passages of whole paragraphs, about 2000 characters each. Of every ten in a row the ninth is for
    development and the tenth for the test, so all three splits are spread over the whole text. Each split is cut into
    consecutive blocks; of these as many as asked for are kept, evenly spread.

    Args:
        source: `PROSE`, whose splits are by topic, or the path of a text file (UTF-8).
        tokenizer_of: folder or hub name of a tokenizer; None for bytes, where every block opens with `corpus.BOS`.
        length: tokens per block that are predicted from the first on; a block of bytes has one more, `corpus.BOS`.
        train: training blocks to keep, at most.
        held_out: development and test blocks to keep, at most each.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too short for a single block per split.
    """
    if source == PROSE:
        prose = corpus.prose()
        parts = {"train": prose.text["train"], "dev": prose.text["validation"], "test": prose.text["test"]}
    else:
        parts = {split: text.encode() for split, text in interleaved(Path(source).read_text("utf-8")).items()}
    cut = {}
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


def interleaved(text: str) -> dict[str, str]:
    """The three splits of a text: of every ten passages the ninth is ``dev``, the tenth ``test``, the rest ``train``.

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


def spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` of the rows, evenly spread from the first to the last; all where there are no more.

    >>> spread(torch.arange(10), 4)
    tensor([0, 3, 6, 9])
    """
    if count >= len(rows):
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)
