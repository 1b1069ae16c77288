"""Policies decide when to tie a knot: each sees a `Signal` after every real optimizer step and answers yes or no."""

import copy
import itertools
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cola.common.arguments import integer, is_finite
from cola.common.distributed import agreed_mean

logger = logging.getLogger("cola")


@dataclass(slots=True)  # not frozen, because that would make every step slower
class Signal:
    """The state of a run right after an optimizer step.

    Attributes:
        step: optimizer steps taken since the run began, including this one (the first signal has step 1).
        epoch: epochs completed, as told by `ChainOptimizer.observe` or an integration; None if not told.
        loss: mean loss of the step's micro-batches, a 0-d tensor on the device that computed it; None if none was seen.
            ``float(loss)`` waits for the device: gather several losses and call `mean` once.
        mean: reduces a 1-d tensor of losses to one number that all processes of a distributed run agree on. A policy
            that decides by losses must call it, at the same steps in every process.
        opt: the `ChainOptimizer`; its ``param_groups`` hold the live link and its gradients.
    """

    step: int
    epoch: float | None = None
    loss: Tensor | None = None
    mean: Callable[[Tensor], float] = agreed_mean
    opt: Any = None


class KnotPolicy(ABC):
    """Decides when a link ends. A subclass needs one method, `update`.

    >>> class EveryPowerOfTwo(KnotPolicy):
    ...     def update(self, signal):
    ...         return signal.step & (signal.step - 1) == 0
    >>> [step for step in range(1, 10) if EveryPowerOfTwo().update(Signal(step))]
    [1, 2, 4, 8]

    Attributes are the policy's state: checkpoints save them as JSON and restore them, except those whose names begin
    with an underscore. Policies combine: ``a | b`` ties when either asks at a step, ``a & b`` when both do.
    """

    @abstractmethod
    def update(self, signal: Signal) -> bool:
        """Called once after every real step, in order; True ties a knot now."""

    def knotted(self, step: int) -> None:  # noqa: B027 (optional)
        """Called after every knot, whoever asked for it."""

    def unreached(self, step: int) -> str | None:
        """The knots still planned when a run ends at ``step``, in words; None if there are none."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """The policy's state as JSON values.

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
        """Take over the `state_dict` of an equal policy.

        Raises:
            ValueError: the state is another policy's, lacks an entry, or (of the built-in policies) holds an impossible
                value; nothing is changed then.
        """
        self._require_own(state)
        try:
            if "_require_valid" in vars(type(self)):  # a user's subclass may use inherited attributes differently
                self._require_valid(state)
        except (ValueError, RecursionError) as error:  # RecursionError: a value is nested too deeply to be shown
            raise ValueError(f"the saved policy is damaged: {error!s:.300}") from None
        vars(self).update({name: copy.deepcopy(value) for name, value in state.items() if name != "policy"})

    def _attributes(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def _require_own(self, state: Any) -> None:
        """Check that the state has this policy's name and entries."""
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
            differ += [f"has {name!r:.40}, which this one lacks" for name in sorted(theirs - mine)]
            raise ValueError(
                f"the saved policy {own} {', '.join(differ)!s:.300}: it is damaged or of another version of the class; "
                "resume with the policy of the saved run"
            )

    def _require_valid(self, state: dict[str, Any]) -> None:  # noqa: B027 (optional)
        """Raise ValueError for a value that this policy cannot have."""

    def __or__(self, other: "KnotPolicy") -> "KnotPolicy":
        return _Either(self, other)

    def __and__(self, other: "KnotPolicy") -> "KnotPolicy":
        return _Both(self, other)

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in self._attributes().items())
        return f"{type(self).__name__}({shown})"


class NeverKnots(KnotPolicy):
    """No knots: one link, tied by `finish()`, which is plain LoRA."""

    def update(self, signal: Signal) -> bool:
        """Never."""
        return False


class StepKnots(KnotPolicy):
    """Knots after given optimizer steps, or after every n-th.

    Args:
        at: steps (from 1, strictly increasing) after which to tie.
        every: tie after each multiple of this many steps.
        total_steps: length of the run, if known; knots at or beyond its end are refused.

    >>> [s for s in range(1, 10) if StepKnots(at=[3, 7]).update(Signal(s))]
    [3, 7]

    Raises:
        ValueError: neither or both of ``at`` and ``every``; steps not positive, not increasing or beyond the run.
    """

    def __init__(
        self, at: Sequence[int] | None = None, every: int | None = None, total_steps: int | None = None
    ) -> None:
        if (at is None) == (every is None):
            raise ValueError(f"StepKnots(at={at!r}, every={every!r}) needs one of at=[...] and every=n")
        self.at = None if at is None else _increasing("StepKnots", "at", at, total_steps, "step")
        self.every = None if every is None else _positive("StepKnots", "every", every)
        if every is not None and total_steps is not None and every >= total_steps:
            raise ValueError(f"StepKnots(every={every}) ties nothing in a run of total_steps={total_steps}")

    def update(self, signal: Signal) -> bool:
        """True at the planned steps."""
        return signal.step % self.every == 0 if self.every is not None else signal.step in (self.at or ())

    def unreached(self, step: int) -> str | None:
        """The planned steps after ``step``."""
        left = [at for at in self.at or () if at > step]
        return f"knots after steps {left}" if left else None

    def _require_valid(self, state: dict[str, Any]) -> None:
        StepKnots(at=state["at"], every=state["every"])


class EpochKnots(KnotPolicy):
    """Knots after given epochs: ``EpochKnots(at=[3], steps_per_epoch=n)`` is the paper's chain of length 2.

    Args:
        at: epochs completed (from 1, strictly increasing) after which to tie.
        steps_per_epoch: optimizer steps in an epoch; None if the signals tell the epoch
            (``opt.observe(loss, epoch=e)`` or an integration).
        total_epochs: length of the run, if known; knots at or beyond its end are refused.

    Raises:
        ValueError: epochs not positive, not increasing or beyond the run; steps_per_epoch not positive.
        RuntimeError: in `update`, if nothing tells the epoch.
    """

    def __init__(self, at: Sequence[int], steps_per_epoch: int | None = None, total_epochs: int | None = None) -> None:
        self.at = _increasing("EpochKnots", "at", at, total_epochs, "epoch")
        self.steps_per_epoch = steps_per_epoch
        if steps_per_epoch is not None:
            self.steps_per_epoch = _positive("EpochKnots", "steps_per_epoch", steps_per_epoch)
        self.done = 0

    def update(self, signal: Signal) -> bool:
        """True at the first step that completes a planned epoch."""
        if self.steps_per_epoch is not None:
            epoch: float = signal.step / self.steps_per_epoch
        elif signal.epoch is not None:
            epoch = signal.epoch
        else:
            raise RuntimeError(
                "EpochKnots does not know the epoch: give steps_per_epoch=n, or call opt.observe(loss, epoch=e)"
            )
        due = sum(at <= epoch for at in self.at)
        fire = due > self.done
        self.done = max(self.done, due)
        return fire

    def unreached(self, step: int) -> str | None:
        """The planned epochs that the run did not reach."""
        left = self.at[self.done :]
        return f"knots after epochs {left}" if left else None

    def _require_valid(self, state: dict[str, Any]) -> None:
        EpochKnots(at=state["at"], steps_per_epoch=state["steps_per_epoch"])
        _positive("EpochKnots", "done", state["done"], least=0)


class EvenKnots(KnotPolicy):
    """A chain of ``length`` equally long links: ``length − 1`` knots inside a run of ``total_steps``.

    >>> [s for s in range(1, 11) if EvenKnots(length=3, total_steps=10).update(Signal(s))]
    [3, 7]

    Raises:
        ValueError: length or total_steps not positive, or fewer steps than links.
    """

    def __init__(self, length: int, total_steps: int) -> None:
        self.length = _positive("EvenKnots", "length", length)
        self.total_steps = _positive("EvenKnots", "total_steps", total_steps)
        if length > total_steps:
            raise ValueError(f"EvenKnots(length={length}, total_steps={total_steps}): a link needs at least one step")

    def update(self, signal: Signal) -> bool:
        """True at step round(i·total_steps/length), i = 1 … length−1."""
        near = signal.step * self.length // self.total_steps  # i or i − 1, if any i fits
        return any(1 <= i < self.length and self._step(i) == signal.step for i in (near, near + 1))

    def unreached(self, step: int) -> str | None:
        """The planned steps after ``step``."""
        left = [at for at in map(self._step, range(1, self.length)) if at > step]
        return f"knots after steps {left}" if left else None

    def _step(self, i: int) -> int:
        # round() in integers, half to even, which is exact for any total
        step, rest = divmod(i * self.total_steps, self.length)
        return step + (2 * rest > self.length or (2 * rest == self.length and step % 2 == 1))

    def _require_valid(self, state: dict[str, Any]) -> None:
        EvenKnots(state["length"], state["total_steps"])


_TELL = (
    "call opt.observe(loss) before opt.step(), or backpropagate the .loss of the model's output. A loss that the loop "
    "computes from the logits is not seen by itself; in a Trainer use cola.integrations.transformers.attach, in "
    "Lightning the callback ChainKnots"
)


class PlateauKnots(KnotPolicy):
    """Tie when the loss has stopped improving, in the words of `torch.optim.lr_scheduler.ReduceLROnPlateau`.

    It compares the mean loss of every ``window`` steps with the best window of the current link. After more than
    ``patience`` windows without a relative improvement of ``threshold`` it ties a knot. Losses are gathered on their
    device and read once per window.

    Args:
        mode: ``"min"`` or ``"max"``.
        patience: windows without improvement to tolerate.
        threshold: smallest relative improvement that counts.
        window: optimizer steps averaged into one observation.
        cooldown: windows to ignore after a knot.
        max_links: largest length of the chain (``max_links − 1`` knots); None for no limit.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: in `update`, if no loss has arrived in the first window.
    """

    def __init__(
        self,
        mode: str = "min",
        patience: int = 3,
        threshold: float = 1e-3,
        window: int = 20,
        cooldown: int = 0,
        max_links: int | None = None,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"PlateauKnots(mode={mode!r}): choose 'min' or 'max'")
        if not (is_finite(threshold) and 0 <= threshold < 1):
            raise ValueError(f"PlateauKnots(threshold={threshold!r}) must be in [0, 1): it is a relative improvement")
        self.mode = mode
        self.patience = _positive("PlateauKnots", "patience", patience, least=0)
        self.threshold = float(threshold)
        self.window = _positive("PlateauKnots", "window", window)
        self.cooldown = _positive("PlateauKnots", "cooldown", cooldown, least=0)
        self.max_links = None if max_links is None else _positive("PlateauKnots", "max_links", max_links)
        self.best: float | None = None
        self.bad_windows = 0
        self.cooling = 0
        self.knots = 0
        self.steps_in_window = 0
        self.losses: list[Any] = []  # 0-d tensors, or numbers after a resume
        self.deaf_steps = 0  # steps before the first loss; -1 once it has come

    def update(self, signal: Signal) -> bool:
        """True at the end of a window that exhausts the patience."""
        self.steps_in_window += 1
        if signal.loss is not None:
            self.losses.append(signal.loss.detach())
            self.deaf_steps = -1
        elif self.deaf_steps >= 0:
            self.deaf_steps += 1  # other policies' knots do not reset this count
            if self.deaf_steps >= self.window:
                raise RuntimeError(
                    f"PlateauKnots has seen {self.deaf_steps} steps (a whole window) and no loss: {_TELL}"
                )
            if self.deaf_steps == 1:
                logger.warning("PlateauKnots saw no loss at the first step: %s", _TELL)
        if self.steps_in_window < self.window:
            return False
        loss = signal.mean(self._stacked()) if self.losses else math.nan
        self.losses, self.steps_in_window = [], 0
        if self.max_links is not None and self.knots >= self.max_links - 1:
            return False
        if self.cooling > 0:
            self.cooling -= 1
            return False
        if self._improves(loss):
            self.best, self.bad_windows = loss, 0
        else:
            self.bad_windows += 1
        return self.bad_windows > self.patience

    def knotted(self, step: int) -> None:
        """Start judging the next link."""
        self.knots += 1
        self.best, self.bad_windows, self.cooling = None, 0, self.cooldown
        self.losses, self.steps_in_window = [], 0

    def state_dict(self) -> dict[str, Any]:
        """As `KnotPolicy.state_dict`; reads the open window's losses from their device."""
        if self.losses:
            self.losses = self._stacked().tolist()  # fp32 survives this, so a resumed window has the same mean
        return super().state_dict()

    def _require_valid(self, state: dict[str, Any]) -> None:
        options = ("mode", "patience", "threshold", "window", "cooldown", "max_links")
        PlateauKnots(**{name: state[name] for name in options})
        for name in ("bad_windows", "knots", "steps_in_window", "cooling"):
            _positive("PlateauKnots", name, state[name], least=0)
        _positive("PlateauKnots", "deaf_steps", state["deaf_steps"], least=-1)
        best, losses = state["best"], state["losses"]
        # a window's mean may overflow, and a loss may be any float
        if not (best is None or is_finite(best) or (isinstance(best, float) and math.isinf(best))):
            raise ValueError(f"PlateauKnots(best={best!r:.80}) must be a number, or None before the first window")
        if not (isinstance(losses, list) and all(isinstance(loss, float) for loss in losses)):
            raise ValueError(f"PlateauKnots(losses={losses!r:.80}) must be a list of floats")
        if len(losses) > state["steps_in_window"]:
            raise ValueError(
                f"PlateauKnots(losses={losses!r:.80}) must be at most one for each of the window's "
                f"{state['steps_in_window']} steps so far"
            )

    def _stacked(self) -> Tensor:
        device = next((x.device for x in self.losses if isinstance(x, Tensor)), "cpu")
        return torch.stack([torch.as_tensor(x, dtype=torch.float32, device=device).reshape(()) for x in self.losses])

    def _improves(self, loss: float) -> bool:
        if math.isnan(loss):
            return False
        if self.best is None:
            return True
        margin = self.threshold * abs(self.best)
        return loss < self.best - margin if self.mode == "min" else loss > self.best + margin


class _Pair(KnotPolicy):
    """Two policies of which both see every signal, so that both states advance; `decide` combines their answers."""

    word = "?"
    decide: Any = any

    def __init__(self, first: KnotPolicy, second: KnotPolicy) -> None:
        for policy in (first, second):
            if not isinstance(policy, KnotPolicy):
                raise TypeError(f"cannot combine a knot policy with {policy!r}: both sides must be KnotPolicy objects")
        self.first, self.second = first, second

    def update(self, signal: Signal) -> bool:
        return self.decide([self.first.update(signal), self.second.update(signal)])

    def knotted(self, step: int) -> None:
        self.first.knotted(step)
        self.second.knotted(step)

    def unreached(self, step: int) -> str | None:
        plans = [plan for plan in (self.first.unreached(step), self.second.unreached(step)) if plan]
        return " and ".join(plans) or None

    def state_dict(self) -> dict[str, Any]:
        return {"policy": type(self).__name__, "first": self.first.state_dict(), "second": self.second.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._require_own(state)
        copy.deepcopy(self.first).load_state_dict(state["first"])  # a rehearsal, so that a refusal changes neither
        self.second.load_state_dict(state["second"])
        self.first.load_state_dict(state["first"])

    def __repr__(self) -> str:
        return f"({self.first!r} {self.word} {self.second!r})"


class _Either(_Pair):
    word, decide = "|", any


class _Both(_Pair):
    word, decide = "&", all


def _positive(policy: str, name: str, value: Any, least: int = 1) -> int:
    number = integer(value)
    if number is None or number < least:
        raise ValueError(f"{policy}({name}={value!r}) must be an integer of at least {least}")
    return number


def _increasing(policy: str, name: str, values: Sequence[int], total: int | None, unit: str) -> list[int]:
    try:
        items = [] if isinstance(values, str) else list(values)
    except TypeError:
        items = []
    if not items:
        raise ValueError(
            f"{policy}({name}={values!r}) needs a non-empty list of {unit}s; for no knots use NeverKnots()"
        )
    numbers = [_positive(policy, name, value) for value in items]
    if any(b <= a for a, b in itertools.pairwise(numbers)):
        raise ValueError(f"{policy}({name}={numbers}) must be strictly increasing")
    if total is not None and numbers[-1] >= total:
        raise ValueError(
            f"{policy}({name}={numbers}) has a knot beyond the run: {unit} {numbers[-1]} of {total} "
            "(the last link is tied by finish(), so knots lie strictly inside)"
        )
    return numbers


def _is_json(value: Any) -> bool:
    """Whether ``value`` survives JSON (tuples as lists)."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
