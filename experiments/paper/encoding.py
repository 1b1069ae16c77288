"""Texts as tokens: the tokens that a model sees, and how many at the end are the option.

The rules are the protocol's. Texts lose the spaces at their ends (never a newline). An option's length is the number of
tokens that it adds to the prompt, counted before anything is cut; only these last tokens are trained or scored. A text
that is too long loses its beginning, except for the token that opens it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from experiments.models import Tokenizer
from experiments.tasks import Sample, Task

WINDOW = 2048
"""The most tokens a model sees."""

NEW_TOKENS = 50
"""The most tokens generated; a generation task's text leaves room for them, also in training."""

SEPARATOR = "\n\n"
"""Between demonstrations, and between the last one and the text."""


@dataclass(frozen=True)
class Encoded:
    """Tokens, of which the last `option_len` are the option: 0 for a prompt to generate from."""

    ids: tuple[int, ...]
    option_len: int


@dataclass(frozen=True)
class Encoder:
    """Turns samples into tokens.

    This class adds the token that opens a text, `tokenizer.bos_token_id`, if the tokenizer opens texts. A fast
    tokenizer would add the token it was built with, even after `bos_token_id` is changed.

    Args:
        tokenizer: see `Tokenizer`.
        max_length: the most tokens the model sees; see `window`.
        max_new_tokens: the room that a generation task's text leaves.
    """

    tokenizer: Tokenizer
    max_length: int = WINDOW
    max_new_tokens: int = NEW_TOKENS

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """The token before every text, or none."""
        bare = self.tokenizer.encode("a", add_special_tokens=False)
        adds = self.tokenizer.encode("a")[: len(bare)] != bare or getattr(self.tokenizer, "add_bos_token", False)
        return (self.tokenizer.bos_token_id,) if adds and self.tokenizer.bos_token_id is not None else ()

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end a generated answer: the newline and, if there is one, the end of text."""
        newline = self.tokenizer.encode("\n", add_special_tokens=False)[-1]
        return (newline,) if self.tokenizer.eos_token_id is None else (newline, self.tokenizer.eos_token_id)

    def ids(self, text: str) -> tuple[int, ...]:
        """All tokens of `text`, including the opening one."""
        return self.opening + tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def room(self, task: Task) -> int:
        """The most tokens of a text of `task`.

        Raises:
            ValueError: no room is left after the generated tokens.
        """
        room = self.max_length - self.max_new_tokens * (task.kind == "generation")
        if room < 2:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for a prompt and max_new_tokens={self.max_new_tokens}"
            )
        return room

    def options(self, task: Task, sample: Sample, demonstrations: Sequence[Sample] = ()) -> tuple[Encoded, ...]:
        """The full text of every candidate, in order."""
        fulls = [task.full(sample, candidate) for candidate in sample.candidates]
        return self._encode(task, task.prompt(sample), fulls, demonstrations)

    def target(self, task: Task, sample: Sample, demonstrations: Sequence[Sample] = ()) -> Encoded:
        """The full text with the first right candidate or answer."""
        return self._encode(task, task.prompt(sample), [task.full(sample, sample.target)], demonstrations)[0]

    def prompt(self, task: Task, sample: Sample, demonstrations: Sequence[Sample] = ()) -> Encoded:
        """The text to generate from."""
        return Encoded(self._cut(task, self.ids(_joined(task, demonstrations, task.prompt(sample)))), 0)

    def null_options(self, task: Task, sample: Sample, demonstrations: Sequence[Sample] = ()) -> tuple[Encoded, ...]:
        """Every candidate after the null prompt, for calibration."""
        fulls = [task.null_full(sample, candidate) for candidate in sample.candidates]
        return self._encode(task, task.null_prompt(sample), fulls, demonstrations)

    def _encode(
        self, task: Task, prompt: str, fulls: Sequence[str], demonstrations: Sequence[Sample]
    ) -> tuple[Encoded, ...]:
        without = len(self.ids(prompt.strip(" ")))
        encoded = []
        for full in fulls:
            alone = self.ids(full.strip(" "))
            shown = _joined(task, demonstrations, full)
            ids = self._cut(task, alone if shown == full.strip(" ") else self.ids(shown))
            # nothing predicts the first token
            option_len = min(len(alone) - without, len(ids) - 1)
            if option_len < 1:
                raise ValueError(
                    f"{task.name}: with this tokenizer the option adds {len(alone) - without} tokens to its prompt, "
                    f"{full[-60:]!r} against {prompt[-60:]!r}, and {len(ids) - 1} can be predicted; it needs one"
                )
            encoded.append(Encoded(ids, option_len))
        return tuple(encoded)

    def _cut(self, task: Task, ids: tuple[int, ...]) -> tuple[int, ...]:
        room = self.room(task)
        if len(ids) <= room:
            return ids
        return self.opening + ids[len(self.opening) - room :]


def _joined(task: Task, demonstrations: Sequence[Sample], text: str) -> str:
    """`text` after the demonstrations, as the model sees it."""
    shown = SEPARATOR.join(task.full(sample, sample.target).strip() for sample in demonstrations).strip()
    return (shown + SEPARATOR + text.strip(" ")).lstrip()


def window(configuration: Any) -> int:
    """The number of tokens that a model with this configuration sees: its positions, 2048 at most."""
    return min(WINDOW, getattr(configuration, "max_position_embeddings", None) or WINDOW)
