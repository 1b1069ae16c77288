"""Fresh state for any base optimizer, without knowing which one it is.

A second instance of the base, made on the same parameters, knows what fresh state is, wherever the base keeps it: per
parameter, in dicts of its own, in an inner optimizer. Entries of the groups that are state rather than settings
(schedule-free's ``k``, Prodigy's ``d``) are those that the base's own ``step`` was seen to change; what users and
schedulers set is left alone.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from cola.knot.tie import KnotError

Factory = Callable[[list[dict[str, Any]]], Optimizer]
Pairs = Mapping[str, tuple[Tensor, Tensor]]
Reset = str | Callable[[Optimizer, Pairs, Pairs], None]

#: what becomes of the base's state at a knot, where a word says it
RESETS = ("state", "keep")

#: what users and schedulers set, even if it happens inside a step (in a closure or a hook)
SETTINGS = {"params", "lr", "initial_lr", "momentum", "betas", "weight_decay", "max_lr", "min_lr"}


class GroupWatch:
    """Finds the param-group entries that a base's own ``step`` changes.

    Python scalars and tuples of them are compared by value, tensors by identity and version, everything else by
    identity: nothing waits for a device.
    """

    def __init__(self) -> None:
        self.changed: set[str] = set()

    def before(self, groups: Sequence[dict[str, Any]]) -> "list[_Held]":
        """What the groups hold now, to hand to `after`."""
        return [(dict(group), _versions(group)) for group in groups]

    def after(self, before: "Sequence[_Held]", groups: Sequence[dict[str, Any]]) -> None:
        """Note the entries that differ."""
        for (old, versions), new in zip(before, groups):
            # nearly always nothing does: one loop in C finds that, where the caches are cold after a step
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
    """Those of ``groups`` that hold any of ``parameters``, in their order."""
    mine = {id(p) for p in parameters}
    return [group for group in groups if any(id(p) in mine for p in group["params"])]


def fresh_instance(
    factory: Factory, groups: Iterable[dict[str, Any]], stepped: set[str], drop: Iterable[str] = ()
) -> Optimizer:
    """A new instance of the base over ``groups``, with their settings but none of what ``step`` put there.

    Args:
        factory: makes the base from param groups.
        groups: live groups; only read.
        stepped: group entries that are state (`GroupWatch.changed`).
        drop: further entries to leave out.
    """
    leave = {*stepped, *drop}
    return factory([{name: value for name, value in group.items() if name not in leave} for group in groups])


def adopt(base: Optimizer, fresh: Optimizer, parameters: Iterable[nn.Parameter], stepped: set[str]) -> None:
    """Give ``parameters`` in ``base`` the state that ``fresh`` has for them.

    Args:
        base: changed in place: the state of ``parameters``, the ``stepped`` entries of the groups that hold them, and
            likewise in optimizers and dicts that it keeps as attributes. If it trains nothing else, all its other
            attributes become fresh as well (LBFGS caches the number of elements); else those are shared and stay.
        fresh: from `fresh_instance`, over the same groups in the same order; give it up afterwards.
        parameters: to reset; others keep their state.
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
    """The state tensors that ``base`` holds for ``parameters``: after a reset none of them may still be there."""
    return [leaf for p in parameters for leaf in _leaves(base.state.get(p))]


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [leaf for item in inside for leaf in _leaves(item)]


def require_reset(reset: Any, ranks: tuple[int, ...] | None) -> None:
    """Check the argument ``reset`` of `ChainOptimizer`.

    Args:
        reset: as given.
        ranks: of all links, as far as they are known.

    Raises:
        ValueError, TypeError: it is neither a known word nor a callable, or state is to be kept over a change of rank.
    """
    if reset == "keep" and len(set(ranks or ())) > 1:
        raise ValueError(f"reset='keep' needs links of one rank, and r={ranks}: use reset='state', or a function")
    if isinstance(reset, str) and reset not in RESETS:
        raise ValueError(f"reset={reset!r} is unknown: choose one of {', '.join(RESETS)}, or give a function")
    if not isinstance(reset, str) and not callable(reset):
        raise TypeError(f"reset={reset!r} must be one of {', '.join(RESETS)}, or a function of (base, old, new)")


def reset_name(reset: Reset) -> str:
    """A word for ``reset``, for a checkpoint to compare."""
    return reset if isinstance(reset, str) else "callable"


def require_keepable(base: Optimizer, reset: Reset) -> None:
    """Check that ``reset`` can be done with this base.

    Raises:
        ValueError: state is to be kept that holds copies of the factors (schedule-free's averages).
    """
    if reset == "keep" and callable(getattr(base, "train", None)):
        raise ValueError(
            f"reset='keep' is not possible with {type(base).__name__}, whose state holds copies of the factors, which "
            "begin anew at a knot: use reset='state'"
        )


def carried_over(
    base: Optimizer, reset: Reset, old: Pairs, new: Pairs, ranks: Mapping[str, int]
) -> dict[Any, Any] | None:
    """The base's state for the factors of the next link, made from that for the old one.

    The base's state for the factors is left as it is. What the function does to the rest of the base stays, unless it
    raises: then the groups' entries and the other parameters' state are put back, though not what is in their tensors.

    Args:
        base: with the state of the old link.
        reset: ``"keep"``, or the function.
        old: the factors of the link that ends.
        new: the Parameters, with the values of the link that begins.
        ranks: of the link that begins, by layer; the Parameters may have room for more.

    Returns:
        State by Parameter; None if all of it stays.

    Raises:
        KnotError: state is to be kept over a change of rank.
        ValueError: the function has written to the new factors.
        Exception: what the function raises.
    """
    if not callable(reset):
        for path, (A, _) in old.items():
            if len(A) != ranks[path]:
                raise KnotError(
                    f"reset='keep' needs links of one rank, and layer {path!r} goes from {len(A)} to {ranks[path]}: "
                    "use reset='state', or a function that gives the state the new shapes"
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
