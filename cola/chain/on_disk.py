"""Keeps a chain on disk: one safetensors file per link, and a manifest that lists them. FORMAT.md has the format.

A link's file is named by its content and never written again. The manifest is replaced by one rename, and files are
deleted only after that. So a process that dies at any moment leaves either the old chain or the new one.
"""

import contextlib
import platform
import re
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cola.chain import tensorfile
from cola.chain.files import (
    MAX_JSON,
    StoreError,
    intended_name,
    locked,
    parse,
    read,
    read_checked,
    seal,
    sha256,
    unseal,
    write,
)
from cola.chain.fingerprint import Fingerprint
from cola.chain.packing import pack, unpack
from cola.common.arguments import is_finite
from cola.common.contexts import unaffected
from cola.common.distributed import writes
from cola.common.version import FORMAT, __version__
from cola.knot.tie import RECORDED
from cola.lora.link import Factor, KnotReport, LayerReport, Link, Rows, are_factors, are_rows
from cola.lora.names import require_plain_name

T = TypeVar("T")

_TRIES = 10  # how often a reader begins, while a run saves
CHAIN, CHECKPOINT = ("chain.json", "cola-chain"), ("checkpoint.json", "cola-checkpoint")
#: names that a manifest may list; nothing else is ever opened or deleted
_OURS = re.compile(r"(link-\d{5,9}|state-\d{1,18})-[0-9a-f]{16}\.safetensors")


@dataclass(frozen=True)
class Entry:
    """A file in a manifest: its name, size in bytes and checksum."""

    file: str
    size: int
    digest: str


@dataclass(frozen=True)
class Ledger:
    """A chain as plain data; `Chain` describes the fields."""

    links: Sequence[Link]
    missing: int = 0
    keep: bool = True
    base: Fingerprint | None = None


def ledger_to_json(ledger: Ledger) -> dict[str, Any]:
    """A ledger without its links, as JSON values."""
    base = None if ledger.base is None else ledger.base.to_json()
    return {"missing": ledger.missing, "keep": ledger.keep, "base": base}


def ledger_of(about: Mapping[str, Any], links: Sequence[Link]) -> Ledger:
    """Reverse `ledger_to_json`.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: the values do not describe a chain, or a link is missing.
    """
    missing, keep, base = about["missing"], about["keep"], about["base"]
    if type(missing) is not int or missing < 0 or type(keep) is not bool:
        raise ValueError(f"missing={missing!r:.40}, keep={keep!r:.40}")
    if [link.index for link in links] != list(range(missing, missing + len(links))):
        raise ValueError("a link is missing")
    return Ledger(links, missing, keep, None if base is None else Fingerprint.from_json(base))


# per link, its entry and the versions of its tensors, so that saving again does not hash every link again
_known: "weakref.WeakKeyDictionary[Link, tuple[Entry, tuple[int, ...]]]" = weakref.WeakKeyDictionary()


def save(directory: Path, ledger: Ledger) -> None:
    """Make ``directory`` hold exactly this chain; links already there stay. In a distributed run process 0 writes.

    Raises:
        StoreError: the directory's manifest is another program's.
        ValueError: a layer's name cannot be stored.
        OSError: writing failed, or another process is saving there; the directory holds what it held before.
    """
    if not writes():
        return
    require_ours(directory, CHAIN)
    with locked(directory):
        write_manifest(directory, CHAIN, write_links(directory, ledger))


@unaffected()
def load(directory: Path) -> Ledger:
    """Read a chain, or the chain in a checkpoint.

    Raises:
        StoreError: there is none, or one of its files is missing, truncated, edited or foreign; names the file.
    """
    if not directory.is_dir():
        raise StoreError(f"{directory} is not a directory: give the one that Chain.save or opt.save wrote")
    return undisturbed(directory, _load)


def undisturbed(directory: Path, read: Callable[[Path], T]) -> T:
    """``read(directory)``; it starts over when a save has replaced the files in the meantime."""
    for _ in range(_TRIES):
        before = _stamp(directory)
        try:
            return read(directory)
        except StoreError:
            if _stamp(directory) == before:
                raise
    return read(directory)


def _stamp(directory: Path) -> list[tuple[int, int]]:
    """A value that changes whenever a manifest is replaced."""
    paths = [directory / name for name, _ in (CHAIN, CHECKPOINT)]
    return [(s.st_ino, s.st_mtime_ns) for s in (path.stat() for path in paths if path.exists())]


def _load(directory: Path) -> Ledger:
    chain, checkpoint = directory / CHAIN[0], directory / CHECKPOINT[0]
    if not checkpoint.exists():
        return read_links(directory, unseal(chain, CHAIN[1], FORMAT), chain)
    manifest = unseal(checkpoint, CHECKPOINT[1], FORMAT)
    inside, at = read_links(directory, manifest.get("chain"), checkpoint), _saved(manifest)
    if not chain.exists():
        return inside
    # both were saved here: the later one counts, even if it is shorter because a link was undone
    manifest = unseal(chain, CHAIN[1], FORMAT)
    alone, then = read_links(directory, manifest, chain), _saved(manifest)
    start = max(inside.missing, alone.missing)
    ours, theirs = (ledger.links[start - ledger.missing :][:1] for ledger in (inside, alone))
    if any(link_to_bytes(a) != link_to_bytes(b) for a, b in zip(ours, theirs)):
        raise StoreError(f"{chain} and {checkpoint} hold different chains: move one of them to another directory")
    return alone if then > at else inside


def _saved(manifest: Mapping[str, Any]) -> int:
    saved = manifest.get("saved", 0)
    return saved if type(saved) is int else 0


def write_manifest(directory: Path, kind: tuple[str, str], content: Mapping[str, Any]) -> None:
    """Replace a manifest, then delete the files that no manifest lists.

    Its time is later than that of the other manifest, even if the clock was turned back in between.
    """
    saved = time.time_ns() // 1000
    for name, other in (CHAIN, CHECKPOINT):
        with contextlib.suppress(StoreError):
            saved = max(saved, _saved(unseal(directory / name, other, FORMAT)) + 1)
    name, format_ = kind
    write(directory / name, seal({"format": format_, "version": FORMAT, "saved": saved, **content}))
    clean(directory)


def write_links(directory: Path, ledger: Ledger) -> dict[str, Any]:
    """Write the links' files that are not there yet; returns the manifest's content."""
    return {
        "libraries": {"cola": __version__, "torch": torch.__version__, "python": platform.python_version()},
        **ledger_to_json(ledger),
        "links": [asdict(_write_link(directory, link)) for link in ledger.links],
    }


def read_links(directory: Path, manifest: Any, path: Path) -> Ledger:
    """The chain that a manifest describes; ``path`` is the manifest's, for messages."""
    try:
        entries = [entry(item, path) for item in manifest["links"]]
        ledger_of(manifest, ())  # before any link is read
    except StoreError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} does not describe a chain ({error!r:.80})") from None
    links = []
    for index, item in enumerate(entries, start=manifest["missing"]):
        link = link_from_bytes(read_checked(directory / item.file, item.size, item.digest), directory / item.file)
        if link.index != index:
            raise StoreError(f"{path} lists {item.file} as link {index}, and it is link {link.index}")
        _known[link] = item, _versions(link)
        links.append(link)
    return ledger_of(manifest, links)


def entry(item: Any, path: Path) -> Entry:
    """Check a manifest's entry. Its name must be one that this library gives, so it cannot leave the directory."""
    try:
        found = Entry(item["file"], item["size"], item["digest"])
    except (KeyError, TypeError):
        raise StoreError(f"{path} has an entry that does not describe a file: {item!r:.80}") from None
    if not isinstance(found.file, str) or not _OURS.fullmatch(found.file):
        raise StoreError(f"{path} lists {found.file!r:.80}, which is not the name of a file of a chain: refused")
    if type(found.size) is not int or found.size < 0 or not isinstance(found.digest, str):
        raise StoreError(f"{path} gives {found.file} an impossible size or checksum")
    return found


def write_content(directory: Path, stem: str, data: bytes) -> Entry:
    """Write a file named by its content, unless it exists."""
    digest = sha256(data)
    item = Entry(f"{stem}-{digest[:16]}.safetensors", len(data), digest)
    if not _is_there(directory, item):
        write(directory / item.file, data)
    return item


def clean(directory: Path) -> None:
    """Delete our files that no manifest in the directory lists, and those of interrupted writes. Never fails."""
    listed: set[str | None] = {CHAIN[0], CHECKPOINT[0]}
    with contextlib.suppress(StoreError, OSError):  # delete nothing if a manifest cannot be read
        for name, kind in (CHAIN, CHECKPOINT):
            path = directory / name
            manifest = unseal(path, kind, FORMAT) if path.exists() else {}
            links = *manifest.get("links", ()), *manifest.get("chain", {}).get("links", ())
            listed.update(item.get("file") for item in (*links, manifest.get("state")) if item)
        for path in directory.iterdir():
            name = intended_name(path.name)
            if (name in listed or _OURS.fullmatch(name)) and path.name not in listed:
                path.unlink()


def require_ours(directory: Path, manifest: tuple[str, str]) -> None:
    """Refuse to replace another program's file.

    Raises:
        StoreError: a file with the manifest's name is not ours, or ``directory`` is a file.
    """
    name, kind = manifest
    path = directory / name
    if directory.exists() and not directory.is_dir():
        raise StoreError(f"{directory} is a file: give a directory to save to")
    if not path.exists():
        return
    try:
        content = parse(read(path, limit=MAX_JSON), path)
    except StoreError:
        return  # our own manifest, damaged: saving repairs the directory
    if not isinstance(content, dict) or content.get("format") != kind:
        raise StoreError(f"{path} belongs to another program: choose another directory")


# one link


def link_to_bytes(link: Link) -> bytes:
    """A link as the bytes of a safetensors file; equal links give equal bytes."""
    tensors, content = link_to_parts(link)
    return tensorfile.dump(tensors, content)


@unaffected()
def link_from_bytes(data: bytes, path: Path) -> Link:
    """Reverse `link_to_bytes`.

    Raises:
        StoreError: this is not a link; names ``path``.
    """
    tensors, content = tensorfile.load(data, path)
    try:
        return link_from_parts(tensors, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} does not hold a link: {error!s:.200}") from None


def link_to_parts(link: Link) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A link as named tensors and JSON values."""
    tensors: dict[str, Tensor] = {}
    for path, factor in link.factors.items():
        require_plain_name(path)
        tensors[f"A:{path}"], tensors[f"B:{path}"] = factor.A, factor.B
        if factor.start is not None:
            tensors[f"A0:{path}"], tensors[f"B0:{path}"] = factor.start
    for path, value in link.trained.items():
        require_plain_name(path)
        tensors[f"trained:{path}"] = value
    for name, rows in link.rows.items():
        require_plain_name(name)
        tensors[f"rows:{name}"], tensors[f"indices:{name}"] = rows.values, rows.indices
    return tensors, {
        "index": link.index,
        "seed": link.seed,
        "layers": {path: _about(factor) for path, factor in link.factors.items()},
        "trained": list(link.trained),
        **({"rows": list(link.rows)} if link.rows else {}),
        "report": pack(asdict(link.report), "report", {}),
    }


def _about(factor: Factor) -> dict[str, Any]:
    about: dict[str, Any] = {"scaling": factor.scaling, "rounding": factor.rounding}
    return about if factor.form == "linear" else {**about, "form": factor.form}


def link_from_parts(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Link:
    """Reverse `link_to_parts`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the parts do not describe a link.
    """
    factors = {}
    for path, about in content["layers"].items():
        require_plain_name(path)
        A, B, scaling, rounding = tensors[f"A:{path}"], tensors[f"B:{path}"], about["scaling"], about["rounding"]
        if not are_factors(A, B):
            raise ValueError(f"the factors of layer {path!r} do not fit: {tuple(A.shape)} and {tuple(B.shape)}")
        if not is_finite(scaling) or rounding not in RECORDED:
            raise ValueError(f"layer {path!r} has scaling {scaling!r:.40} and rounding {rounding!r:.40}")
        start = (tensors[f"A0:{path}"], tensors[f"B0:{path}"]) if f"A0:{path}" in tensors else None
        if start is not None and (start[0].shape != A.shape or start[1].shape != B.shape):
            raise ValueError(f"the start of layer {path!r} does not fit its factors")
        form = about.get("form", "linear")
        if not isinstance(form, str):
            raise ValueError(f"layer {path!r} has the form {form!r:.40}")
        factors[path] = Factor(
            A, B, float(scaling), rounding, start, form
        )  # an integer could be larger than torch takes
    trained = {}
    for path in content["trained"]:
        require_plain_name(path)
        trained[path] = tensors[f"trained:{path}"]
    rows = {}
    for name in content.get("rows", ()):
        require_plain_name(name)
        rows[name] = Rows(tensors[f"indices:{name}"], tensors[f"rows:{name}"])
        if not are_rows(rows[name].indices, rows[name].values):
            raise ValueError(f"the rows of {name!r} do not fit their indices")
    starts = sum(factor.start is not None for factor in factors.values())
    if len(tensors) != 2 * (len(factors) + starts + len(rows)) + len(trained):
        raise ValueError("it holds tensors that belong to no layer")
    index, seed = content["index"], content["seed"]
    if type(index) is not int or type(seed) is not int or index < 0:
        raise ValueError(f"index {index!r:.40} and seed {seed!r:.40} are not integers")
    return Link(index, seed, factors, trained, _report(unpack(content["report"], {})), rows)


def _report(values: dict[str, Any]) -> KnotReport:
    layers = {path: LayerReport(**_known_fields(LayerReport, x)) for path, x in values["layers"].items()}
    report = KnotReport(**{**_known_fields(KnotReport, values), "layers": layers})
    norms = (norm for layer in layers.values() for norm in (layer.delta_norm, layer.lost_norm))
    loss = 0.0 if report.loss is None else report.loss
    own = (report.index, report.step, report.rank, report.delta_norm, report.lost_norm, report.seconds, loss)
    # norms may be infinite: a run can meet such
    if not all(isinstance(number, float) or is_finite(number) for number in (*own, *norms)):
        raise ValueError(f"its report is not one: {values!r:.80}")
    return report


def _known_fields(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values without those that a later version has added."""
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _write_link(directory: Path, link: Link) -> Entry:
    known = _known.get(link)
    if known is not None and known[1] == _versions(link) and _is_there(directory, known[0]):
        return known[0]
    item = write_content(directory, f"link-{link.index:05d}", link_to_bytes(link))
    _known[link] = item, _versions(link)
    return item


def _is_there(directory: Path, item: Entry) -> bool:
    """Compare name (it contains the checksum) and size; reading a long chain at every save would be too slow."""
    path = directory / item.file
    return path.is_file() and path.stat().st_size == item.size


def _versions(link: Link) -> tuple[int, ...]:
    """Torch's counts of in-place changes of the link's tensors."""
    tensors = (t for factor in link.factors.values() for t in (factor.A, factor.B, *(factor.start or ())))
    rows = (t for own in link.rows.values() for t in (own.indices, own.values))
    return tuple(t._version for t in (*tensors, *link.trained.values(), *rows))
