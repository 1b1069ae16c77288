"""Files for several processes: written whole or not at all, locked, and carried from one machine to another."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers see all of it or nothing, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON as `write_atomically` does. NaN and infinities, which JSON does not have, become null."""
    write_atomically(path, json.dumps(_finite(values), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a file; False if another process holds it.

    The lock is free again when its holder ends, even if it is killed.
    """
    from filelock import FileLock, Timeout

    try:
        held = FileLock(path).acquire(timeout=0)
    except Timeout:
        yield False
        return
    with held:
        yield True


def read_folder(folder: Path, without: str) -> dict[str, bytes]:
    """All files of a folder by their path in it, but for the folder ``without`` there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(inside): (folder / inside).read_bytes() for path in files
            if (inside := path.relative_to(folder)).parts[0] != without}  # fmt: skip


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files that `read_folder` read."""
    for inside, content in files.items():
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        (folder / inside).write_bytes(content)
