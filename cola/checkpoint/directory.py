"""Keeps a run in a directory: the chain's own files, one state file, and a manifest that lists both.

Weights are not stored, because the untouched base model and the links give them. The manifest is replaced by one
rename, so a process that dies while saving leaves the previous checkpoint. cola/chain/FORMAT.md has the details.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cola.chain import tensorfile
from cola.chain.files import StoreError, locked, read_checked, unseal
from cola.chain.on_disk import (
    CHAIN,
    CHECKPOINT,
    entry,
    read_links,
    require_ours,
    undisturbed,
    write_content,
    write_links,
    write_manifest,
)
from cola.chain.packing import pack, unpack
from cola.checkpoint.state import RunState, decode, encode
from cola.common.distributed import writes
from cola.common.version import FORMAT
from cola.lora.names import require_plain_name


def write_run(directory: Path, state: RunState) -> None:
    """Replace the directory's checkpoint by this one, which has its chain. In a distributed run process 0 writes.

    Raises:
        TypeError: the optimizer's state holds something that only pickling could keep.
        OSError: writing failed, or another process is saving there; the directory holds what it held before.
    """
    if not writes():
        return
    assert state.chain is not None
    require_ours(directory, CHECKPOINT)
    for path in (*state.trained, *state.buffers):
        require_plain_name(path)
    content, tensors = encode(state)
    data = tensorfile.dump(tensors, {**content, "optimizer": pack(state.optimizer, "optimizer", tensors)})
    with locked(directory):
        item = write_content(directory, f"state-{state.counters.index}", data)
        chain = write_links(directory, state.chain)
        write_manifest(directory, CHECKPOINT, {"chain": chain, "state": asdict(item)})


def read_run(directory: Path) -> RunState:
    """Read a checkpoint.

    Raises:
        StoreError: a file is missing, truncated, edited or foreign; names the file.
    """
    return undisturbed(directory, _read)


def _read(directory: Path) -> RunState:
    path = directory / CHECKPOINT[0]
    if not path.is_file() and (directory / CHAIN[0]).is_file():
        raise StoreError(
            f"{directory} holds a chain from Chain.save, and no run to continue: give opt.load a directory from "
            "opt.save, or continue after the chain's links by opt.follow(Chain.load(directory))"
        )
    manifest = unseal(path, CHECKPOINT[1], FORMAT)
    chain = read_links(directory, manifest.get("chain"), path)
    item = entry(manifest.get("state"), path)
    path = directory / item.file
    tensors, content = tensorfile.load(read_checked(path, item.size, item.digest), path)
    try:
        optimizer: dict[str, Any] = unpack(content["optimizer"], tensors)
        return decode(content, tensors, optimizer, chain)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} does not hold the state of a run: {error!s:.200}") from None
