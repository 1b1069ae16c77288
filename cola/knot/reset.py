"""Resets the state of any base optimizer, by copying it from a new instance over the same parameters.

The new instance has fresh state wherever the base keeps state: per parameter, in other dicts, in an inner optimizer.
Group entries that the base's own ``step`` changes are state too (schedule-free's ``k``, Prodigy's ``d``); other entries
are settings of users and schedulers, and stay.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cola.knot.tie import KnotError
from cola.knot.transport import MOMENTS, Block, transport

Factory = Callable[[list[dict[str, Any]]], Optimizer]
Pairs = Mapping[str, tuple[Tensor, Tensor]]
Reset = str | Callable[[Optimizer, Pairs, Pairs], None]

#: named values of ``reset``
RESETS = ("state", "keep", "transport")

#: entries that users and schedulers set, even inside a step (in a closure or a hook)
SETTINGS = {"params", "lr", "initial_lr", "momentum", "betas", "weight_decay", "max_lr", "min_lr"}


class GroupWatch:
    """Finds the param-group entries that a base's own ``step`` changes.

    It compares Python scalars and tuples of them by value, tensors by identity and version, everything else by
    identity, so it never waits for a device.
    """

    def __init__(self) -> None:
        self.changed: set[str] = set()

    def before(self, groups: Sequence[dict[str, Any]]) -> "list[_Held]":
        """The groups' present entries, to pass to `after`."""
        return [(dict(group), _versions(group)) for group in groups]

    def after(self, before: "Sequence[_Held]", groups: Sequence[dict[str, Any]]) -> None:
        """Note the entries that differ."""
        for (old, versions), new in zip(before, groups):
            # usually nothing differs, and one loop in C finds this fast although caches are cold after a step
            if not versions and [*old] == [*new] and all(map(is_, old.values(), new.values())):
                continue
            for name, value in new.items():
                known = old.get(name, _MISSING)
                if name in SETTINGS or name in self.changed:
                    continue
                if known is value:
                    same = name not in versions or versions[name] == value._version
                else:
                    same = _plain(known) and _plain(value) and known == value
                if not same:
                    self.changed.add(name)


#: the entries of a group, and the versions of those that are tensors
_Held = tuple[dict[str, Any], dict[str, int]]
_MISSING = object()
_NO_TENSORS = frozenset({bool, int, float, str, tuple, list, type(None)})


def _versions(group: dict[str, Any]) -> dict[str, int]:
    if _NO_TENSORS.issuperset(map(type, group.values())):
        return {}
    return {name: value._version for name, value in group.items() if isinstance(value, Tensor)}


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_plain(item) for item in value)
    return isinstance(value, (bool, int, float, str))


def groups_with(groups: Iterable[dict[str, Any]], parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """The ``groups`` that hold any of ``parameters``, in order."""
    mine = {id(p) for p in parameters}
    return [group for group in groups if any(id(p) in mine for p in group["params"])]


def fresh_instance(
    factory: Factory, groups: Iterable[dict[str, Any]], stepped: set[str], drop: Iterable[str] = ()
) -> Optimizer:
    """A new instance of the base over ``groups``, with their settings but without their state.

    Args:
        factory: makes the base from param groups.
        groups: live groups; only read.
        stepped: group entries that are state (`GroupWatch.changed`).
        drop: further entries to leave out.
    """
    leave = {*stepped, *drop}
    return factory([{name: value for name, value in group.items() if name not in leave} for group in groups])


def adopt(base: Optimizer, fresh: Optimizer, parameters: Iterable[nn.Parameter], stepped: set[str]) -> None:
    """Move the state of ``parameters`` from ``fresh`` to ``base``.

    Args:
        base: changed in place: the state of ``parameters``, the ``stepped`` entries of their groups, and the same in
            optimizers and dicts among its attributes. If it trains nothing else, all its other attributes become fresh
            as well (LBFGS caches the number of elements); otherwise they are shared and stay.
        fresh: from `fresh_instance`, over the same groups in the same order; not to be used afterwards.
        parameters: the parameters to reset; others keep their state.
        stepped: group entries that are state.
    """
    mine = {id(p): p for p in parameters}
    for group, new in zip(groups_with(base.param_groups, mine.values()), fresh.param_groups):
        for name in stepped & new.keys():
            group[name] = new[name]
    _adopt_entries(base.state, fresh.state, mine)
    alone = all(id(p) in mine for group in base.param_groups for p in group["params"])
    for name, value in vars(fresh).items():
        if name in ("state", "param_groups", "defaults", "step") or name.startswith("_optimizer_"):
            continue
        held = getattr(base, name, None)
        if isinstance(held, Optimizer) and isinstance(value, Optimizer):
            adopt(held, value, mine.values(), stepped)
        elif isinstance(held, dict) and isinstance(value, dict) and any(id(key) in mine for key in (*held, *value)):
            _adopt_entries(held, value, mine)
        elif alone:
            setattr(base, name, value)


def _adopt_entries(held: dict[Any, Any], fresh: dict[Any, Any], mine: dict[int, nn.Parameter]) -> None:
    for parameter in mine.values():
        held.pop(parameter, None)
        if parameter in fresh:
            held[parameter] = fresh[parameter]


def tensors_of(base: Optimizer, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The state tensors that ``base`` holds for ``parameters``; a reset must replace all of them."""
    return [leaf for p in parameters for leaf in _leaves(base.state.get(p))]


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [leaf for item in inside for leaf in _leaves(item)]


def require_reset(reset: Any, ranks: tuple[int, ...] | None) -> None:
    """Raise ValueError or TypeError for a ``reset`` that `ChainOptimizer` cannot use with links of these ranks."""
    if reset == "keep" and len(set(ranks or ())) > 1:
        raise ValueError(f"reset='keep' needs links of one rank, and r={ranks}: use reset='state', or a function")
    if isinstance(reset, str) and reset not in RESETS:
        raise ValueError(f"reset={reset!r} is unknown: choose one of {', '.join(RESETS)}, or give a function")
    if not isinstance(reset, str) and not callable(reset):
        raise TypeError(f"reset={reset!r} must be one of {', '.join(RESETS)}, or a function of (base, old, new)")


def reset_name(reset: Reset) -> str:
    """``reset`` as a word, for a checkpoint to compare."""
    return reset if isinstance(reset, str) else "callable"


def require_keepable(base: Optimizer, reset: Reset, make: Factory) -> None:
    """Raise ValueError if ``reset`` cannot keep or rotate this base's state; ``make`` makes another base like it."""
    if reset == "transport":
        _require_rotatable(base, make)
    if reset == "keep" and callable(getattr(base, "train", None)):
        raise ValueError(
            f"reset='keep' is not possible with {type(base).__name__}, whose state holds copies of the factors, which "
            "begin anew at a knot: use reset='state'"
        )


def _require_rotatable(base: Optimizer, make: Factory) -> None:
    """Raise ValueError if `transport` cannot rotate this base's state, as steps of another one like it show."""
    device = next(p.device for group in base.param_groups for p in group["params"])
    # no square: there a moment may have the right shape by chance
    parameter = nn.Parameter(torch.ones(3, 2, device=device))
    parameter.grad = torch.ones_like(parameter)
    unknown, why = [], ""
    try:
        trial = make([{"params": [parameter]}])
        for _ in range(3):  # some state appears late
            trial.step()
    except Exception as error:  # LBFGS needs a closure, schedule-free its train()
        unknown, why = ["the state"], f", which raises {error!r:.200} in a trial step"
    else:
        for name, value in trial.state[parameter].items():
            known = name in MOMENTS and getattr(value, "shape", None) == parameter.shape
            if not known and any(leaf.dim() for leaf in _leaves(value)):
                unknown.append(repr(name))
        held = {name: value for name, value in vars(trial).items() if value is not trial.state}
        unknown += [repr(name) for name, value in held.items() if _is_kept_in(value, parameter)]
    if unknown:
        raise ValueError(
            f"reset='transport' cannot rotate {min(unknown)} of {type(base).__name__}{why}: use Adam, AdamW, NAdam, "
            "RAdam, Muon or SGD, or reset='state'"
        )


def _is_kept_in(value: Any, parameter: Tensor) -> bool:
    """Whether state of a parameter is in this: an inner optimizer, a dict by Parameter or id, or some of these."""
    value = getattr(value, "state", value)
    if isinstance(value, dict):
        if any(key is parameter or (type(key) is int and key == id(parameter)) for key in value):
            return True
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(_is_kept_in(item, parameter) for item in value)


def carried_over(
    base: Optimizer,
    reset: Reset,
    old: Pairs,
    new: Pairs,
    ranks: Mapping[str, int],
    blocks: Mapping[str, Sequence[Block]] | None = None,
    scales: Mapping[str, float] | None = None,
) -> dict[Any, Any] | None:
    """Compute the base's state for the next link from its state for the old one.

    The base's state for the factors is left as it is. What the function does to the rest of the base stays, unless it
    raises: then the groups' entries and the other parameters' state are put back, though not the values of tensors.

    Args:
        base: holds the state of the old link.
        reset: ``"keep"``, or the function.
        old: the factors of the old link.
        new: the Parameters, with the values of the next link.
        ranks: ranks of the next link, by layer; the Parameters may have room for more.
        blocks, scales: as in `transport`.

    Returns:
        State by Parameter; None if all of it stays.

    Raises:
        KnotError: ``"keep"`` at a change of rank.
        ValueError: the function has written to the new factors.
        Exception: any that the function raises.
    """
    if reset == "transport":
        reset = partial(transport, blocks=blocks, scales=scales)
    if not callable(reset):
        for path, (A, _) in old.items():
            if A.shape[-2] != ranks[path]:
                raise KnotError(
                    f"reset='keep' needs links of one rank, and layer {path!r} goes from {A.shape[-2]} to "
                    f"{ranks[path]}: use reset='state', or a function that gives the state the new shapes"
                )
        return None
    parameters = [p for pair in new.values() for p in pair]
    held = {p: copy.deepcopy(base.state[p]) for p in parameters if p in base.state}
    rest, groups = dict(base.state), [dict(group) for group in base.param_groups]
    versions = [p._version for p in parameters]
    try:
        reset(base, old, new)
        if versions != [p._version for p in parameters]:
            raise ValueError(
                f"reset={getattr(reset, '__name__', reset)!s:.60} has written to the new link's factors, and it is for "
                "the base's state alone: LinkConfig(init=...) says where a link starts"
            )
        return {p: base.state[p] for p in parameters if p in base.state}
    except BaseException:
        base.state.update(rest)
        for group, entries in zip(base.param_groups, groups):
            group.clear()
            group.update(entries)
        raise
    finally:
        for parameter in parameters:
            base.state.pop(parameter, None)
        base.state.update(held)
