"""A running chain on disk: the chain's own files, one state file, and a manifest that lists both.

The base weights are not in it: they are rebuilt from the untouched base and the links. What is: the live link, values
trained beside it, the base optimizer's state, counters, policy and random states. The manifest is replaced by one
rename, so a process that dies while saving leaves the previous checkpoint.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cola import replay, tensorfile
from cola.adapters.targets import base_tensors, buffers_by_name
from cola.arguments import is_finite
from cola.counters import class_name, require_same_groups
from cola.distributed import writes
from cola.extend import Pair, Prepared
from cola.files import StoreError, locked, read_checked, unseal
from cola.fingerprint import Fingerprint
from cola.live import LiveLink
from cola.packing import pack, unpack
from cola.store import (
    CHAIN,
    CHECKPOINT,
    Ledger,
    entry,
    read_links,
    require_ours,
    require_plain_name,
    undisturbed,
    write_content,
    write_links,
    write_manifest,
)
from cola.version import FORMAT

logger = logging.getLogger("cola")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        ledger: the chain.
        state: the base optimizer's state dict.
        base_class: name of its class.
        link: the live link's factors by layer, and its scale.
        trained: values of what is trained beside the adapters, by path.
        buffers: persistent buffers that are no longer the base's, by path.
        others: values of parameters in groups of the caller's own, in order.
        loss: of the last step.
        weights: fingerprint of the weights when it was saved.
        rng: random states by device.
    """

    ledger: Ledger
    state: dict[str, Any]
    base_class: str
    link: Prepared
    trained: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    others: list[Tensor]
    loss: float | None
    weights: Fingerprint
    rng: Mapping[str, Tensor]


def save(
    directory: Path,
    ledger: Ledger,
    live: LiveLink,
    base: Optimizer,
    state: dict[str, Any],
    loss: float | None,
    weights: Fingerprint,
    buffers: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint in the place of the directory's former one.

    Args:
        directory: made if need be.
        ledger: the chain.
        live: the live link.
        base: the base optimizer.
        state: its state dict, with the chain's counters in it.
        loss: of the last step.
        weights: fingerprint of the adapted layers as they are.
        buffers: persistent buffers that are no longer the base's.

    Raises:
        TypeError: the optimizer's state holds what only pickling could keep.
        OSError: writing failed, or another process is saving there; the directory holds what it held before.
    """
    if not writes():
        return
    require_ours(directory, CHECKPOINT)
    tensors: dict[str, Tensor] = {}
    packed = pack(state, "optimizer", tensors)
    for path, (A, B) in live.snapshot().items():
        tensors[f"live/A:{path}"], tensors[f"live/B:{path}"] = A, B
    tensors.update({f"trained:{path}": value for path, value in live.trained().items()})
    tensors.update({f"buffer:{path}": value for path, value in buffers.items()})
    tensors.update({f"other/{i}": value for i, value in enumerate(_others(base, live))})
    tensors.update({f"rng/{device}": value for device, value in _rng_states().items()})
    content = {
        "optimizer": packed,
        "base_class": class_name(base),
        "rank": live.rank,
        "scaling": live.scaling,
        "loss": pack(loss, "loss", {}),
        "weights": weights.to_json(),
    }
    for path in (*live.trained(), *buffers):
        require_plain_name(path)
    data = tensorfile.dump(tensors, content)
    with locked(directory):
        item = write_content(directory, f"state-{live.index}", data)
        chain = write_links(directory, ledger)
        write_manifest(directory, CHECKPOINT, {"chain": chain, "state": asdict(item)})


def require_links(ledger: Ledger) -> None:
    """Refuse to save a chain whose weights could not be rebuilt.

    Raises:
        RuntimeError: its links were not kept, or were lost.
    """
    if not ledger.keep or ledger.missing:
        raise RuntimeError(
            "save() writes the links, from which load() rebuilds the weights, and this chain does not have all of "
            "them (keep_links=False, or lost by a framework's checkpoint): save model.state_dict() and "
            "opt.state_dict() instead"
        )


def read(directory: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        StoreError: a file is missing, truncated, edited or foreign; names the file.
    """
    return undisturbed(directory, _read)


def _read(directory: Path) -> Checkpoint:
    path = directory / CHECKPOINT[0]
    if not path.is_file() and (directory / CHAIN[0]).is_file():
        raise StoreError(
            f"{directory} holds a chain, as Chain.save writes it, and no run to go on from: give opt.load a directory "
            "of opt.save, or take the chain's links by opt.follow(Chain.load(directory))"
        )
    manifest = unseal(path, CHECKPOINT[1], FORMAT)
    ledger = read_links(directory, manifest.get("chain"), path)
    item = entry(manifest.get("state"), path)
    path = directory / item.file
    tensors, content = tensorfile.load(read_checked(path, item.size, item.digest), path)
    try:
        named: dict[str, dict[str, Tensor]] = {"live/A": {}, "live/B": {}, "trained": {}, "buffer": {}}
        for name, tensor in tensors.items():
            kind, colon, layer = name.partition(":")
            if colon and kind in named:
                named[kind][layer] = tensor
        pairs: dict[str, Pair] = {layer: (A, named["live/B"][layer]) for layer, A in named["live/A"].items()}
        loss, scaling = unpack(content["loss"], {}), content["scaling"]
        if not isinstance(loss, (float, type(None))) or not is_finite(scaling):
            raise ValueError(f"its loss is {loss!r:.40} and its scale {scaling!r:.40}")
        return Checkpoint(
            ledger,
            _state_dict(unpack(content["optimizer"], tensors)),
            content["base_class"],
            Prepared(pairs, float(scaling), content["rank"]),
            named["trained"],
            named["buffer"],
            [tensors[f"other/{i}"] for i in range(sum(name.startswith("other/") for name in tensors))],
            loss,
            Fingerprint.from_json(content["weights"]),
            {name.removeprefix("rng/"): tensor for name, tensor in tensors.items() if name.startswith("rng/")},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} does not hold the state of a run: {error!s:.200}") from None


def _state_dict(value: Any) -> dict[str, Any]:
    """A base optimizer's, of the form that all have."""
    groups = value["param_groups"]
    if not isinstance(value["state"], dict) or not isinstance(groups, list) or not groups:
        raise ValueError(f"its optimizer is {value!r:.80}")
    if not all(isinstance(group, dict) and isinstance(group["params"], list) for group in groups):
        raise ValueError(f"its optimizer has the groups {groups!r:.80}")
    return value


def check(saved: Checkpoint, index: int, live: LiveLink, base: Optimizer) -> None:
    """Whether the run can go on from ``saved`` on this model; changes nothing. The counters have been compared.

    Raises:
        ValueError: another base optimizer, other groups, a missing link, or other base weights.
    """
    require_same_groups(saved.state, {"base_class": saved.base_class}, base)
    if len(saved.ledger.links) != index:
        raise ValueError(f"the saved run is at link {index}, and {len(saved.ledger.links)} are there: one is missing")
    here, there = live.trained(), saved.trained
    if {n: p.shape for n, p in here.items()} != {n: t.shape for n, t in there.items()}:
        raise ValueError(f"the saved run trained {sorted(there)} beside the links, here it would be {sorted(here)}")
    if [p.shape for p in _others(base, live)] != [t.shape for t in saved.others]:
        raise ValueError("the parameters that were added by add_param_group have other shapes than in the saved run")
    if saved.link.pairs.keys() != live.layers.keys():
        raise ValueError(f"the saved live link is on {sorted(saved.link.pairs)}, here it is on {sorted(live.layers)}")
    for path, (out, inner) in live.shapes().items():
        (A, B), rank = saved.link.pairs[path], live.plans[path].rank_of(index)
        if A.shape != (rank, inner) or B.shape != (out, rank):
            raise ValueError(
                f"the saved live link of layer {path!r} is {tuple(B.shape)} by {tuple(A.shape)}, here it would be "
                f"({out}, {rank}) by ({rank}, {inner})"
            )
    rank, scaling = live.rank_of(index), live.scaling_of(index)
    if saved.link.rank != rank or not math.isclose(saved.link.scaling, scaling):
        raise ValueError(
            f"the saved live link has rank {saved.link.rank} and scale {saved.link.scaling}, here it would have rank "
            f"{rank} and scale {scaling}"
        )
    buffers = buffers_by_name(live.model)
    for path, value in sorted(saved.buffers.items()):
        if path not in buffers or (buffers[path].shape, buffers[path].dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"the saved run has a buffer {path!r} {tuple(value.shape)} of {value.dtype}, which this model does not "
                "have"
            )
    recorded = (name for link in saved.ledger.links for name in link.trained)
    replaced = [*recorded, *saved.trained, *saved.buffers]
    replay.check(live.model, saved.ledger.links, saved.ledger.base, live=True, replaced=replaced)


def rehearse(saved: Checkpoint, scratch: Optimizer) -> None:
    """Load the base's state and the random states into copies, so that what cannot be loaded is found in time.

    Raises:
        ValueError: they cannot.
    """
    try:
        load_exactly(scratch, saved.state)
        for device, state in saved.rng.items():
            if device == "cpu":
                torch.Generator().set_state(state)
            elif not device.isdecimal():
                raise ValueError(f"there is a random state of {device!r:.40}")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"the saved state of the base optimizer or of torch's generators is damaged: {error}"
        ) from None


@torch.no_grad()
def rebuild(saved: Checkpoint, index: int, live: LiveLink, base: Optimizer) -> None:
    """Weights, live link and base state as they were saved. Call `check` first."""
    live.replay(saved.ledger.links)
    live.begin(index, saved.link)
    for path, parameter in live.trained().items():
        parameter.copy_(saved.trained[path])
    for path, buffer in buffers_by_name(live.model).items():
        if path in saved.buffers:
            buffer.copy_(saved.buffers[path])
    for parameter, value in zip(_others(base, live), saved.others):
        parameter.copy_(value)
    difference = next(saved.weights.differences(base_tensors(live.model), all_of_it=False), None)
    if difference is not None:
        logger.warning(
            "the rebuilt weights agree with the saved run's within rounding, not bit for bit (%r differs): another "
            "device, library version, kernel or number of threads sums in another order",
            difference.name,
        )


def load_exactly(base: Optimizer, state: dict[str, Any]) -> None:
    """``base.load_state_dict`` without its change of dtypes: torch casts floating-point state to the parameter's."""
    base.load_state_dict(state)
    parameters = [p for group in base.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters):
        if number in state["state"] and parameter in base.state:
            base.state[parameter] = _uncast(base.state[parameter], state["state"][number])


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """Set torch's global generators as they were saved; a device that is not here is left out, with a warning."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available() and int(device) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(device))
        else:
            logger.warning("the random state of CUDA device %s was saved, and there is no such device here", device)


def _rng_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.update({str(i): torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())})
    return states


def _others(base: Optimizer, live: LiveLink) -> list[nn.Parameter]:
    """Parameters in the base's groups that the link does not account for: the caller's own."""
    known = {id(p) for p in (*live.adapters(), *live.trained().values())}
    return [p for group in base.param_groups for p in group["params"] if id(p) not in known]


def _uncast(loaded: Any, saved: Any) -> Any:
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        return saved.to(loaded.device) if saved.dtype != loaded.dtype else loaded
    if isinstance(loaded, dict) and isinstance(saved, dict):
        return {key: _uncast(value, saved.get(key)) for key, value in loaded.items()}
    if isinstance(loaded, list) and isinstance(saved, list) and len(loaded) == len(saved):
        return [_uncast(a, b) for a, b in zip(loaded, saved)]
    return loaded
