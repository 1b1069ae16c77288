"""Progress: a bar on a terminal, and elsewhere a plain line for every tenth of the work."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Progress(tqdm):
    """tqdm's bar, on standard error; a pipe or a file gets whole lines without carriage returns.

    Args:
        *args: as for tqdm.
        **kwargs: as for tqdm; give a total, a unit, and if you like a `desc`.
    """

    disable: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        file: Any = kwargs.setdefault("file", sys.stderr)
        self.plain = not file.isatty()
        self.tenths = 0
        super().__init__(*args, **kwargs | ({"mininterval": 0, "miniters": 1} if self.plain else {}))

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or write a line if another tenth is done."""
        if not self.plain:
            super().display(msg, pos)
            return
        tenths = int(10 * self.n / self.total) if self.total else 0
        if tenths > self.tenths:
            self.tenths = tenths
            print(self._line(), file=self.fp, flush=True)

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Make room for other output; plain lines need none."""
        if not self.plain:
            super().clear(*args, **kwargs)

    def close(self) -> None:
        """End the bar; plain lines are whole already."""
        if self.plain and not self.disable:
            self.disable = True
            self._decr_instances(self)
        super().close()

    def _line(self) -> str:
        """Such as ``pretrain: 540 of 5,400 steps, 00:12 so far, about 01:48 to go, 3.412 bits per byte``."""
        seconds, made = self.format_dict["elapsed"], self.n - self.initial
        left = f", about {self.format_interval(seconds / made * (self.total - self.n))} to go" if made else ""
        return (
            f"{self.desc.removesuffix(': ') + ': ' if self.desc else ''}{self.n:,} of {self.total:,} {self.unit}s, "
            f"{self.format_interval(seconds)} so far{left if self.n < self.total else ''}"
            f"{', ' + self.postfix if self.postfix else ''}"
        )
