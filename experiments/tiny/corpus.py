"""The two texts of the offline default, read from the running Python: code to pre-train on, prose to fine-tune on.

Code is the source of the standard library. Prose is `pydoc_data.topics`, the chapters of the language reference that
`help()` shows. Both are sequences of bytes; a token is a byte, and `BOS` opens every block.

The chapters quote one another (`compound` holds `if`, `while`, `for`, ... word for word), so a split by topic alone
would put the same sentences into training and test. Therefore a paragraph is first removed from all topics but the
longest that has it, and topics are then dealt out to the splits.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

BOS = 256
"""The token in front of every block; 0 to 255 are bytes."""

VOCABULARY = 257

_NOT_CODE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
# pdb's docstring is the topic `debugger` nearly word for word
_QUOTED_BY_PROSE = {"pdb.py"}

_A_TOPIC = 200

SHARES: Mapping[str, float] = {"train": 0.76, "validation": 0.12, "test": 0.12}
"""The share of the prose's bytes that each split should get."""


@dataclass(frozen=True)
class Prose:
    """The three splits of the prose: their bytes and their topics."""

    text: Mapping[str, bytes]
    topics: Mapping[str, tuple[str, ...]]

    @property
    def digest(self) -> str:
        """Twelve hex digits that change when any split does (topics differ between Python versions)."""
        return digest(b"\0".join(self.text[split] for split in SHARES))


def digest(text: bytes) -> str:
    """The first twelve hex digits of the SHA-256 of `text`."""
    return hashlib.sha256(text).hexdigest()[:12]


def code(held_out_every: int = 40, root: Path | None = None) -> tuple[bytes, bytes]:
    """The standard library's source as `(train, held_out)` bytes, split by file.

    Args:
        held_out_every: every n-th file, ordered by path, is held out; 40 is 2.5 %.
        root: the folder to read, by default the running interpreter's standard library.

    Raises:
        FileNotFoundError: the folder holds no Python source (some distributions ship it separately).
    """
    train, held_out = _dealt(root, lambda index: index % held_out_every == held_out_every - 1, 2)
    return train, held_out


def code_in_three(root: Path | None = None) -> tuple[bytes, bytes, bytes]:
    """The standard library's source as `(train, validation, test)` bytes; of 40 files one goes to either of the last.

    The files for the test are those that `code` holds out.

    Args:
        root: as for `code`.

    Raises:
        FileNotFoundError: as `code`.
    """
    train, validation, test = _dealt(root, lambda index: {19: 1, 39: 2}.get(index % 40, 0), 3)
    return train, validation, test


def _dealt(root: Path | None, split: Callable[[int], int], splits: int) -> list[bytes]:
    """The sources dealt out by their index in the order of paths, the first split to be filled."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    parts: list[list[bytes]] = [[] for _ in range(splits)]
    for index, path in enumerate(_sources(root)):
        parts[split(index)].append(path.read_bytes())
    if not parts[0]:
        raise FileNotFoundError(f"root={str(root)!r} holds no Python source; install the standard library's")
    return [b"\n".join(part) for part in parts]


def _sources(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if not _NOT_CODE.intersection(folders) and path.name not in _QUOTED_BY_PROSE:
            yield path


def prose(topics: Mapping[str, str] | None = None) -> Prose:
    """The prose, without repeated paragraphs, split by topic.

    Topics are dealt out from the longest to the shortest, each to the split that is furthest below its share in
    `SHARES`. The result is deterministic, and balanced for any Python version's topics.

    Args:
        topics: name -> text; by default those of `pydoc_data.topics`.

    Raises:
        ValueError: fewer than three topics have text that no longer topic has.
    """
    if topics is None:
        from pydoc_data.topics import topics as of_this_python

        topics = of_this_python
    unique = without_repeats(topics)
    if len(unique) < len(SHARES):
        raise ValueError(f"topics: {len(unique)} with text of their own; a split needs {len(SHARES)} or more")
    total = sum(len(text) for text in unique.values())
    missing = {split: share * total for split, share in SHARES.items()}
    dealt: dict[str, list[str]] = {split: [] for split in SHARES}
    for name in sorted(unique, key=lambda name: (-len(unique[name]), name)):
        split = max(missing, key=lambda split: missing[split])
        missing[split] -= len(unique[name])
        dealt[split].append(name)
    text = {split: "\n".join(unique[name] for name in names).encode() for split, names in dealt.items()}
    return Prose(text, {split: tuple(names) for split, names in dealt.items()})


def without_repeats(topics: Mapping[str, str]) -> dict[str, str]:
    """`topics` with every paragraph only in the longest topic that has it, and without empty topics.

    Blank lines separate paragraphs. Paragraphs that differ only in white space are equal. A topic with less than 200
    characters left (its heading) counts as empty.
    """
    seen: set[str] = set()
    unique: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        kept = []
        for paragraph in paragraphs(topics[name]):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph)
        text = "\n\n".join(kept) + "\n"
        if len(text) >= _A_TOPIC:
            unique[name] = text
    return unique


def paragraphs(text: str) -> list[str]:
    """The parts of `text` between blank lines."""
    return re.split(r"\n\s*\n", text)


def thin(text: bytes, size: int, piece: int = 2048) -> bytes:
    """About `size` bytes of `text`, in pieces of `piece` bytes spread evenly over it, or all of it."""
    if size >= len(text):
        return text
    pieces = max(1, size // piece)
    starts = [index * (len(text) - piece) // max(1, pieces - 1) for index in range(pieces)]
    return b"".join(text[start : start + piece] for start in starts)


def blocks(text: bytes, length: int, offset: int = 0) -> torch.Tensor:
    """`text` from byte `offset` on as consecutive blocks: int64, n x (1 + `length`), column 0 is `BOS`.

    Every byte is predicted exactly once (a remainder of fewer than `length` bytes is left out), so the mean loss over
    blocks in nats, divided by ln 2, is in bits per byte.

    Raises:
        ValueError: `text` is shorter than one block.
    """
    count = (len(text) - offset) // length
    if count < 1:
        raise ValueError(f"text: {len(text)} bytes from offset={offset} do not fill one block of {length}")
    body = torch.frombuffer(bytearray(text[offset : offset + count * length]), dtype=torch.uint8)
    ids = torch.full((count, 1 + length), BOS, dtype=torch.int64)
    ids[:, 1:] = body.view(count, length)
    return ids


def epoch(text: bytes, length: int, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """One pass over `text` in shuffled batches, each int64, `batch_size` x (1 + `length`).

    The blocks start at a random offset, so that every pass cuts the text elsewhere. The last batch may be smaller. The
    number of batches is `batches_per_epoch` for every offset.
    """
    offset = int(torch.randint(length, (), generator=generator))
    ids = blocks(text, length, offset)[: _blocks_per_epoch(text, length)]
    yield from ids[torch.randperm(len(ids), generator=generator)].split(batch_size)


def forever(text: bytes, length: int, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The batches of `epoch`, pass after pass."""
    while True:
        yield from epoch(text, length, batch_size, generator)


def batches_per_epoch(text: bytes, length: int, batch_size: int) -> int:
    """How many batches `epoch` yields."""
    return -(-_blocks_per_epoch(text, length) // batch_size)


def _blocks_per_epoch(text: bytes, length: int) -> int:
    return (len(text) - length + 1) // length
