"""Writes files so that a crash leaves them whole or absent, and distrusts the files that it reads.

A file is written under a temporary name, flushed to the disk and renamed, so its name never shows half of it. A reader
checks kind and size first. Nothing is unpickled, here or anywhere in this package.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: manifests are small; a larger file is not one
MAX_JSON = 64 << 20
#: levels of nested lists and objects; this package writes a dozen
MAX_DEPTH = 100
#: the name of a file whose `write` was interrupted; it contains the intended name
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")
#: exists in a directory while a process saves there
LOCK = ".cola.lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


class StoreError(ValueError):
    """A file or directory cannot be used; the message names it and says why."""


def write(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, replacing any file there, or change nothing.

    Raises:
        OSError: the disk is full, the directory is read-only, …; the operating system's own subclass.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise _unwritten(path, error) from error


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes from saving to ``directory`` while the block runs; it is created if it does not exist.

    The lock is the operating system's, on a file in the directory, so it ends with the process. On a file system
    without locks (some network ones) nobody is kept out.

    Raises:
        BlockingIOError: another process (or thread) is saving there; the message says which.
        OSError: the directory cannot be created or written to.
    """
    from filelock import FileLock, Timeout

    path = directory / LOCK
    lock = FileLock(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        reason = f"{_holder(path)} is saving there now; what was saved before is intact: give each run a directory"
        raise BlockingIOError(errno.EWOULDBLOCK, reason, str(directory)) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise _unwritten(directory, error) from error
    with contextlib.suppress(OSError):  # Windows lets nobody write to a locked file
        path.write_text(f"process {os.getpid()} on {platform.node()}")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before the release: a process that has opened it already sees that it is gone
        lock.release()


def read(path: Path, limit: int | None = None) -> bytes:
    """The bytes of a regular file, which may have at most ``limit``.

    Raises:
        StoreError: it is missing, is not a regular file, or is larger.
    """
    try:
        # non-blocking, because opening a named pipe would wait for a writer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise StoreError(f"{path} is not a regular file")
    with open(descriptor, "rb") as file:
        if limit is not None and status.st_size > limit:
            raise StoreError(f"{path} has {status.st_size} bytes, where {limit} are expected: it was edited")
        try:
            return file.read(status.st_size)
        except MemoryError:
            raise StoreError(f"{path} has {status.st_size} bytes, more than there is memory for") from None


def read_checked(path: Path, size: int, digest: str) -> bytes:
    """The bytes of a file that a manifest lists.

    Raises:
        StoreError: it is missing, truncated or longer, or its content has changed.
    """
    data = read(path, limit=size)
    if len(data) < size:
        raise StoreError(f"{path} is truncated: {len(data)} of {size} bytes are there")
    if sha256(data) != digest:
        raise StoreError(f"{path} has changed since it was written (its checksum differs): restore it from a copy")
    return data


def sha256(data: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(data).hexdigest()


def seal(content: dict[str, Any]) -> bytes:
    """A manifest: JSON with the checksum of its own content under ``"sha256"``. Floats must be finite."""
    return json.dumps({**content, "sha256": _content_digest(content)}, indent=1, ensure_ascii=False).encode()


def unseal(path: Path, kind: str, version: int) -> dict[str, Any]:
    """Read a manifest of format ``kind`` and check it.

    Raises:
        StoreError: it is missing, damaged or edited, or of another format or version.
    """
    content = parse(read(path, limit=MAX_JSON), path)
    if not isinstance(content, dict) or content.get("format") != kind:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise StoreError(f"{path} is not a {kind} manifest (its format is {found!r:.40})")
    if content.get("version") != version or type(content["version"]) is not int:
        raise StoreError(
            f"{path} has format version {content.get('version')!r:.40}, and this library reads version {version}: use "
            "the version of cola that wrote it"
        )
    if content.pop("sha256", None) != _content_digest(content):
        raise StoreError(f"{path} was edited or damaged: its content does not match its checksum")
    return content


def parse(data: bytes, path: Path) -> Any:
    """The value of a JSON text.

    Raises:
        StoreError: it is not JSON, has a name twice in one object, a number that is not finite (NaN, 1e400), or more
            than `MAX_DEPTH` levels; names ``path``.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
        _require_shallow(value)
        return value
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not readable as JSON ({str(error)[:100]})") from None


def intended_name(name: str) -> str:
    """A file's name; that of an interrupted `write` without the temporary parts."""
    temporary = _TEMPORARY.fullmatch(name)
    return temporary[1] if temporary else name


def _holder(lock: Path) -> str:
    with contextlib.suppress(OSError):
        text = lock.read_bytes()[:200].decode(errors="replace")
        return "".join(c for c in text if c.isprintable()) or "another process"
    return "another process"


def _unwritten(path: Path, error: OSError) -> OSError:
    reason = f"cannot write it, {error.strerror or error}; what was saved before is intact"
    return OSError(error.errno, reason, str(path))


def _sync(directory: Path) -> None:
    """Flush a rename to the disk. Systems that cannot open directories (Windows) do so themselves."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _content_digest(content: dict[str, Any]) -> str:
    try:
        canonical = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError):
        return "not written by this library"
    return sha256(canonical.encode())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for parent in level
            if isinstance(parent, (list, dict))
            for item in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
