"""Checks that a saved run fits this one, and makes this one continue it."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cola.chain import replay
from cola.chain.on_disk import Ledger
from cola.checkpoint.state import RunState, class_name
from cola.lora.link import Link
from cola.lora.live import LiveLink
from cola.lora.names import buffers_by_name

logger = logging.getLogger("cola")

_DROPPED = (
    "a framework dropped the state's 'cola' entry. Save such a run by opt.save, or by torch.save of opt.state_dict()"
)


def require_links(ledger: Ledger) -> None:
    """Refuse to save a chain from which the weights cannot be rebuilt.

    Raises:
        RuntimeError: its links were not kept, or were lost.
    """
    if not ledger.keep or ledger.missing:
        raise RuntimeError(
            "save() writes the links, from which load() rebuilds the weights, and this chain does not have all of "
            "them (keep_links=False, or lost by a framework's checkpoint): save model.state_dict() and "
            "opt.state_dict() instead"
        )


def require_same_groups(saved: RunState, base: Optimizer) -> None:
    """Refuse a state that does not fit the base. Torch would load it, or refuse it with a less helpful message.

    Raises:
        ValueError: the optimizer's class, or the number of parameters in its groups, differs.
    """
    theirs, mine = saved.counters.base_class, class_name(base)
    if theirs != mine:
        raise ValueError(f"the saved run's base optimizer is {theirs}, here it is {mine}")
    here = [len(group["params"]) for group in base.param_groups]
    there = [len(group["params"]) for group in saved.optimizer["param_groups"] if "params" in group]
    if here != there:
        raise ValueError(
            f"the saved run's groups hold {there} parameters, here they hold {here}: make the ChainOptimizer with the "
            "saved run's arguments, and add what it had added by add_param_group"
        )


def require_carried(saved: RunState, live: LiveLink) -> None:
    """Check that a state dict has everything that the chain needs to continue.

    Raises:
        ValueError: a link is missing, or a framework dropped the ``"cola"`` entry and the run depends on it.
            Compensated rounding does, because its residuals may hold most of the small updates. Re-quantising does,
            because it starts from the original codes and all links.
    """
    counters, chain = saved.counters, saved.chain
    if chain is not None and chain.missing + len(chain.links) != counters.index:
        held = [link.index for link in chain.links]
        raise ValueError(f"the state is at link {counters.index} and holds the links {held}: a link is missing")
    lacking = [path for path in counters.started if path not in saved.start_A]
    if lacking:
        raise ValueError(
            f"the live link of layer {lacking[0]!r} did not start at zero, and the saved state does not have its "
            f"start: {_DROPPED}"
        )
    for path, A in saved.start_A.items():
        B, shape, rank = saved.start_B[path], live.shapes().get(path), A.shape[-2] if A.dim() > 1 else 0
        if (
            path not in live.layers
            or shape is None
            or rank != live.plans[path].rank_of(counters.index)
            or A.shape != (*shape[:-2], rank, shape[-1])
            or B.shape != (*shape[:-1], rank)
        ):
            raise ValueError(
                f"the start of the saved live link of layer {path!r} is {tuple(B.shape)} by {tuple(A.shape)}, which "
                "does not fit the link here"
            )
    if counters.finished or not counters.index:
        return
    if live.originals:
        if chain is None or chain.missing or not chain.keep:
            raise ValueError(
                "quantized='requantize' needs all links at every knot, and the saved state lacks some: keep them "
                "(keep_links=True), and save by opt.save, or by torch.save of opt.state_dict() with its 'cola' entry"
            )
        difference = None if chain.base is None else replay.codes_differ(chain.base, live.originals)
        if difference is not None:
            raise ValueError(
                f"quantized='requantize' starts from the original codes at every knot, and {difference}: make the "
                "ChainOptimizer over the untouched base, and load the model's state dict after that"
            )
    for path, layer in live.layers.items():
        if live.rounding_of(path) == "compensated":
            residual = saved.residuals.get(path)
            if residual is None:
                raise ValueError(
                    f"compensated rounding needs the residual of layer {path!r}, which this state lacks: {_DROPPED}"
                )
            if residual.shape != layer.plain_weight.shape:
                raise ValueError(
                    f"the residual of layer {path!r} is {tuple(residual.shape)}, the weight "
                    f"{tuple(layer.plain_weight.shape)}"
                )


def check(saved: RunState, live: LiveLink, base: Optimizer) -> None:
    """Check that a directory's checkpoint can continue on this model. Changes nothing.

    Raises:
        ValueError: the base optimizer, its groups, the live link or the base model's weights differ, or a link is
            missing.
    """
    require_same_groups(saved, base)
    assert saved.chain is not None
    index, links = saved.counters.index, saved.chain.links
    if len(links) != index:
        raise ValueError(f"the saved run is at link {index}, and has {len(links)} links: one is missing")
    here, there = live.trained(), saved.trained
    if {n: p.shape for n, p in here.items()} != {n: t.shape for n, t in there.items()}:
        raise ValueError(f"alongside the links the saved run trained {sorted(there)}, here it would be {sorted(here)}")
    if [p.shape for p in others(base, live)] != [t.shape for t in _in_order(saved.others)]:
        raise ValueError("the parameters that were added by add_param_group have other shapes than in the saved run")
    if saved.A.keys() != live.layers.keys():
        raise ValueError(f"the saved live link is on {sorted(saved.A)}, here it is on {sorted(live.layers)}")
    for path, (*stack, out, inner) in live.shapes().items():
        A, B, rank = saved.A[path], saved.B[path], live.plans[path].rank_of(index)
        wanted_A, wanted_B = (*stack, rank, inner), (*stack, out, rank)
        if A.shape != wanted_A or B.shape != wanted_B:
            raise ValueError(
                f"the saved live link of layer {path!r} is {tuple(B.shape)} by {tuple(A.shape)}, here it would be "
                f"{wanted_B} by {wanted_A}"
            )
        start_A, start_B = saved.start_A.get(path, A), saved.start_B.get(path, B)
        if start_A.shape != A.shape or start_B.shape != B.shape:
            raise ValueError(f"the start of the saved live link of layer {path!r} has another shape than the link")
    buffers = buffers_by_name(live.model)
    for path, value in sorted(saved.buffers.items()):
        if path not in buffers or (buffers[path].shape, buffers[path].dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"the saved run has a buffer {path!r} {tuple(value.shape)} of {value.dtype}, which this model does not "
                "have"
            )
    recorded = (name for link in links for name in link.trained)
    replaced = [*recorded, *saved.trained, *saved.buffers]
    replay.check(live.model, links, saved.chain.base, live=True, replaced=replaced)


def rehearse(saved: RunState, scratch: Optimizer) -> None:
    """Load the base's state and the random states into copies, so that a failure changes nothing.

    Raises:
        ValueError: one of them cannot be loaded.
    """
    try:
        load_exactly(scratch, saved.optimizer)
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
def rebuild(saved: RunState, live: LiveLink, base: Optimizer) -> None:
    """Restore weights, live link and base state. Call `check` first."""
    assert saved.chain is not None
    replay_links(live, saved.chain.links)
    index = saved.counters.index
    live.begin(index, {path: live.factor_of(index, path, A, saved.B[path]) for path, A in saved.A.items()})
    live.starts.give_back({path: (A, saved.start_B[path]) for path, A in saved.start_A.items()})
    for path, parameter in live.trained().items():
        parameter.copy_(saved.trained[path])
    for path, buffer in buffers_by_name(live.model).items():
        if path in saved.buffers:
            buffer.copy_(saved.buffers[path])
    for parameter, value in zip(others(base, live), _in_order(saved.others)):
        parameter.copy_(value)
    load_exactly(base, saved.optimizer)


def replay_links(live: LiveLink, links: Sequence[Link]) -> None:
    """Tie the chain's first links into the untouched weights."""
    live.take_links(())
    replay.tie_links(live.model, links, live.residuals, live.config.residual_device, live.originals)
    live.take_rows(links)


def load_exactly(base: Optimizer, state: dict[str, Any]) -> None:
    """``base.load_state_dict`` without torch's cast of floating-point state to the parameter's dtype."""
    base.load_state_dict(state)
    parameters = [p for group in base.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters):
        if number in state["state"] and parameter in base.state:
            base.state[parameter] = _uncast(base.state[parameter], state["state"][number])


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """Set torch's global generators; a warning names devices that are not here."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available() and int(device) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(device))
        else:
            logger.warning("the random state of CUDA device %s was saved, and there is no such device here", device)


def rng_states() -> dict[str, Tensor]:
    """Torch's global random states, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.update({str(i): torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())})
    return states


def others(base: Optimizer, live: LiveLink) -> list[nn.Parameter]:
    """The caller's own parameters in the base's groups, which belong to neither the link nor the model."""
    known = {id(p) for p in (*live.adapters(), *live.trained().values())}
    return [p for group in base.param_groups for p in group["params"] if id(p) not in known]


def _in_order(numbered: Mapping[str, Tensor]) -> list[Tensor]:
    return [numbered[name] for name in sorted(numbered, key=int)]


def _uncast(loaded: Any, saved: Any) -> Any:
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        return saved.to(loaded.device) if saved.dtype != loaded.dtype else loaded
    if isinstance(loaded, dict) and isinstance(saved, dict):
        return {key: _uncast(value, saved.get(key)) for key, value in loaded.items()}
    if isinstance(loaded, list) and isinstance(saved, list) and len(loaded) == len(saved):
        return [_uncast(a, b) for a, b in zip(loaded, saved)]
    return loaded
