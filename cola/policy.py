"""What a knot policy is: it sees a `Signal` after every real optimizer step and answers yes or no."""

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cola.distributed import agreed_mean


@dataclass(slots=True)  # not frozen: then a field would be set by a call, at every step
class Signal:
    """What a policy may know of a run, given right after an optimizer step.

    Attributes:
        step: optimizer steps taken since the run began, this one included (the first signal has step 1).
        epoch: epochs completed, as told by `ChainOptimizer.observe` or by an integration; None when nobody told.
        loss: the mean loss that the step has optimised, over its micro-batches, a 0-d tensor on the device that
            computed it; None if none was seen. ``float(loss)`` waits for the device: gather several and ask `mean`
            once.
        opt: the `ChainOptimizer`, with whose ``param_groups`` a policy can look at the live link and its gradients.
        mean: turns a 1-d tensor of losses into one number, agreed by all processes of a distributed run. A policy that
            decides from losses must go through it, at the same steps in every process.
    """

    step: int
    epoch: float | None = None
    loss: Tensor | None = None
    mean: Callable[[Tensor], float] = agreed_mean
    opt: Any = None


class KnotPolicy(ABC):
    """Decides when a link ends. Subclass it with one method.

    >>> class EveryPowerOfTwo(KnotPolicy):
    ...     def update(self, signal):
    ...         return signal.step & (signal.step - 1) == 0
    >>> [step for step in range(1, 10) if EveryPowerOfTwo().update(Signal(step))]
    [1, 2, 4, 8]

    Attributes are the policy's state: they are saved with a checkpoint as JSON and given back on resume. Those whose
    names begin with an underscore are not. Policies combine: ``a | b`` ties when either asks at a step, ``a & b`` when
    both ask at the same step.
    """

    @abstractmethod
    def update(self, signal: Signal) -> bool:
        """Called once after every real step, in order; True ties a knot now."""

    def knotted(self, step: int) -> None:  # noqa: B027 (a hook, not a duty)
        """Told after every knot, whoever asked for it."""

    def unreached(self, step: int) -> str | None:
        """What the policy still had planned when a run ends at ``step``, in words; None if nothing."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """The policy's attributes as JSON values, but for those that begin with an underscore.

        Raises:
            TypeError: an attribute cannot be written as JSON.
        """
        state = {"policy": type(self).__name__, **self._attributes()}
        for name, value in state.items():
            if not _is_json(value):
                raise TypeError(
                    f"{type(self).__name__}.{name}={value!r} cannot be saved as JSON: keep numbers, strings, lists and "
                    "dicts with string keys as attributes, or override state_dict and load_state_dict"
                )
        return json.loads(json.dumps(state))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of an equal policy gave.

        Raises:
            ValueError: the state is another policy's, lacks an entry, or (of the built-in policies) holds a value that
                the policy can never have; nothing is changed then.
        """
        self._require_own(state)
        try:
            if "_require_sense" in vars(type(self)):  # what a user's subclass makes of its attributes is its own affair
                self._require_sense(state)
        except (ValueError, RecursionError) as error:  # the latter where a value is nested too deeply to be shown
            raise ValueError(f"the saved policy is damaged: {error!s:.300}") from None
        vars(self).update({name: copy.deepcopy(value) for name, value in state.items() if name != "policy"})

    def _attributes(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def _require_own(self, state: Any) -> None:
        """The state has this policy's name and entries, whatever their values are."""
        own = type(self).__name__
        if not isinstance(state, dict) or not isinstance(state.get("policy"), str):
            raise ValueError(
                f"the saved policy is damaged: a {type(state).__name__} without a name, not a state of {own}"
            )
        theirs, mine = set(map(str, state)) - {"policy"}, set(self._attributes())
        if state["policy"] != own:
            raise ValueError(
                f"the saved policy is {state['policy']:.80} with {sorted(theirs)!s:.200}, this one is {own} with "
                f"{sorted(mine)}: resume with the policy of the saved run"
            )
        if theirs != mine:
            differ = [f"lacks {name!r}" for name in sorted(mine - theirs)]
            differ += [f"has {name!r:.40}, which this one has not" for name in sorted(theirs - mine)]
            raise ValueError(
                f"the saved policy {own} {', '.join(differ)!s:.300}: it is damaged or of another version of the class; "
                "resume with the policy of the saved run"
            )

    def _require_sense(self, state: dict[str, Any]) -> None:  # noqa: B027 (a hook, not a duty)
        """Raise ValueError for a value that this policy cannot have; built-in policies know theirs."""

    def __or__(self, other: "KnotPolicy") -> "KnotPolicy":
        return _Either(self, other)

    def __and__(self, other: "KnotPolicy") -> "KnotPolicy":
        return _Both(self, other)

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in self._attributes().items())
        return f"{type(self).__name__}({shown})"


class _Pair(KnotPolicy):
    """Two policies asked at every step; both always see the signal, so both states advance."""

    word = "?"

    def __init__(self, first: KnotPolicy, second: KnotPolicy) -> None:
        for policy in (first, second):
            if not isinstance(policy, KnotPolicy):
                raise TypeError(f"cannot combine a knot policy with {policy!r}: both sides must be KnotPolicy objects")
        self.first, self.second = first, second

    def knotted(self, step: int) -> None:
        """Tell both."""
        self.first.knotted(step)
        self.second.knotted(step)

    def unreached(self, step: int) -> str | None:
        """What either still had planned."""
        plans = [plan for plan in (self.first.unreached(step), self.second.unreached(step)) if plan]
        return " and ".join(plans) or None

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {
            "policy": type(self).__name__,
            "first": self.first.state_dict(),
            "second": self.second.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give both their states back."""
        self._require_own(state)
        copy.deepcopy(self.first).load_state_dict(state["first"])  # rehearsed, so that a refusal changes neither
        self.second.load_state_dict(state["second"])
        self.first.load_state_dict(state["first"])

    def __repr__(self) -> str:
        return f"({self.first!r} {self.word} {self.second!r})"


class _Either(_Pair):
    word = "|"

    def update(self, signal: Signal) -> bool:
        first, second = bool(self.first.update(signal)), bool(self.second.update(signal))
        return first or second


class _Both(_Pair):
    word = "&"

    def update(self, signal: Signal) -> bool:
        first, second = bool(self.first.update(signal)), bool(self.second.update(signal))
        return first and second


def _is_json(value: Any) -> bool:
    """Whether JSON gives ``value`` back (tuples as lists)."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
