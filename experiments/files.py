"""Files for several processes: written whole or not at all, and locked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers see all of it or nothing, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a file; False if another process holds it.

    The lock is free again when its holder ends, even if it is killed.
    """
    try:
        held = FileLock(path).acquire(timeout=0)
    except Timeout:
        yield False
        return
    with held:
        yield True
