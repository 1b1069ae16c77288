"""Fresh state for any base optimizer, without knowing which one it is.

No key is named here. A second instance of the base, made on the same parameters, knows what fresh state is; and
the group entries that are state rather than settings (schedule-free's ``k``, Prodigy's ``d``) are those that the base's
own ``step`` was seen to change, whereas what the user or a scheduler sets (``lr``) is left alone.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Factory = Callable[[list[dict[str, Any]]], Optimizer]


class GroupWatch:
    """Finds the param-group entries that a base's own ``step`` changes.

    Python scalars and tuples of them are compared by value, everything else by identity, so nothing waits for a device.
    """

    def __init__(self) -> None:
        self.changed: set[str] = set()

    def before(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """A shallow copy of the groups, to hand to `after`."""
        return [dict(group) for group in groups]

    def after(self, before: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> None:
        """Note the entries that differ."""
        for old, new in zip(before, groups):
            for name, value in new.items():
                if name == "params" or name in self.changed:
                    continue
                known = old.get(name, _MISSING)
                if known is not value and not (_plain(known) and _plain(value) and known == value):
                    self.changed.add(name)


_MISSING = object()


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_plain(item) for item in value)
    return isinstance(value, (bool, int, float, str))


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


def adopt(base: Optimizer, fresh: Optimizer, groups: Sequence[dict[str, Any]], stepped: set[str]) -> None:
    """Give the parameters of ``groups`` in ``base`` the state that ``fresh`` has for them.

    Args:
        base: changed in place: per-parameter state, and the ``stepped`` entries of ``groups``.
        fresh: from `fresh_instance` over the same groups, in order; give it up afterwards.
        groups: the groups of ``base`` to reset. If they are all it has, its own scalar attributes (LBFGS caches the
            number of elements) become fresh as well.
        stepped: group entries that are state.
    """
    for group, new in zip(groups, fresh.param_groups):
        for parameter in group["params"]:
            base.state.pop(parameter, None)
            if parameter in fresh.state:
                base.state[parameter] = fresh.state[parameter]
        for name in stepped & new.keys():
            group[name] = new[name]
    if len(groups) == len(base.param_groups):
        for name, value in vars(fresh).items():
            if value is None or isinstance(value, (bool, int, float)):
                setattr(base, name, value)


def is_fresh(base: Optimizer, fresh: Optimizer, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether ``base`` holds exactly the state of ``fresh`` for ``parameters`` (the invariant after a knot)."""
    return all(_equal(base.state.get(p), fresh.state.get(p)) for p in parameters)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    return a is b or (not a and not b) or a == b
