"""Policies decide when to tie a knot: each sees a `Signal` after every real optimizer step and answers yes or no."""

import copy
import inspect
import itertools
import json
import logging
import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cola.common.arguments import integer, is_finite
from cola.common.distributed import agreed_mean

logger = logging.getLogger("cola")

_SHORT = reprlib.Repr()  # of lists and texts the beginning


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

    def _shortfall(self, step: int, *, one_link: bool) -> str | None:
        """What a user should know of a run that ended at ``step``, in words; None if it went as the policy planned.

        Args:
            step: optimizer steps that the run took.
            one_link: whether its last link was its first.
        """
        plan = self.unreached(step)
        if not one_link or not step or self._wants_one_link():
            return f"the run ended after {step} steps, and {self._name()} had still planned {plan}" if plan else None
        why = f"had still planned {plan}" if plan else f"asked for none{self._why(step)}"
        return (
            f"no knot was tied in {step} step{'' if step == 1 else 's'}: this run was one LoRA. {self._name()} {why}. "
            "For a chain of M links use EvenKnots(length=M, total_steps=n); for one link on purpose, NeverKnots()"
        )

    def _wants_one_link(self) -> bool:
        """Whether the policy's arguments rule out any knot."""
        return False

    def _name(self) -> str:
        """The policy without its state, for messages."""
        return type(self).__name__

    def _why(self, step: int) -> str:
        """Why no knot was asked for, if the policy knows, to follow on "asked for none"."""
        return ""

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

    def _given(self) -> list[str]:
        """The constructor's arguments that are attributes."""
        return [name for name in inspect.signature(type(self).__init__).parameters if name in self._attributes()]

    def _settings(self) -> str:
        """The constructor's arguments that are attributes, as JSON: in full, and as a checkpoint gives them back."""
        return json.dumps({name: self._attributes()[name] for name in self._given()}, default=repr)

    def __repr__(self) -> str:
        own, parameters = self._attributes(), inspect.signature(type(self).__init__).parameters
        given = self._given()
        shown = ", ".join(
            f"{name}={' '.join(_SHORT.repr(own[name]).split())}"
            for name in given or own
            if not (given and _is_default(own[name], parameters[name].default))
        )
        return f"{type(self).__name__}({shown})"


class NeverKnots(KnotPolicy):
    """No knots: one link, tied by `finish()`, which is plain LoRA."""

    def update(self, signal: Signal) -> bool:
        """Never."""
        return False

    def _wants_one_link(self) -> bool:
        return True


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

    def _why(self, step: int) -> str:
        return "" if self.every is None else f", the first being due after {self.every} steps"

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

    def _wants_one_link(self) -> bool:
        return self.length == 1

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


class _Windows(KnotPolicy):
    """Judges a link by the means of a number over windows of steps.

    The numbers are gathered on their device and read once per window. A knot starts a new window.
    """

    def __init__(self, window: int | None, cooldown: int, max_links: int | None, total_steps: int | None) -> None:
        name = type(self).__name__
        self.total_steps = None if total_steps is None else _positive(name, "total_steps", total_steps)
        usual = 20 if total_steps is None else max(1, total_steps // 100)
        self.window = usual if window is None else _positive(name, "window", window)
        self.cooldown = _positive(name, "cooldown", cooldown, least=0)
        self.max_links = None if max_links is None else _positive(name, "max_links", max_links)
        self.cooling = 0
        self.knots = 0
        self.steps_in_window = 0
        self.values: list[Any] = []  # 0-d tensors, or numbers after a resume

    @property
    @abstractmethod
    def _shortest(self) -> int:
        """The fewest windows after which a link can end."""

    @abstractmethod
    def _judge(self, mean: float) -> bool:
        """Whether a window with this mean ends the link; NaN if the window has no finite value."""

    def _take(self, step: int, value: Tensor | None, mean: Callable[[Tensor], float]) -> bool:
        """Add a step to the window; True if the window is complete and ends the link."""
        self.steps_in_window += 1
        if value is not None:
            self.values.append(value)
        if self.steps_in_window < self.window:
            return False
        result = mean(self._stacked()) if self.values else math.nan
        self.values, self.steps_in_window = [], 0
        if self.max_links is not None and self.knots >= self.max_links - 1:
            return False
        if self.cooling > 0:
            self.cooling -= 1
            return False
        left = None if self.total_steps is None else self.total_steps - step
        return self._judge(result) and (left is None or left >= (self._shortest + self.cooldown) * self.window)

    def knotted(self, step: int) -> None:
        """Start judging the next link."""
        self.knots += 1
        self.cooling = self.cooldown
        self.values, self.steps_in_window = [], 0

    def _wants_one_link(self) -> bool:
        return self.max_links == 1

    def _why(self, step: int) -> str:
        first = self._shortest * self.window
        if step < first:
            return f", and could not: with window={self.window} a link has {first} steps or more"
        least = first + (self._shortest + self.cooldown) * self.window
        if self.total_steps is not None and self.total_steps < least:
            return f", and could not: with window={self.window} it needs total_steps={least} or more"
        return ""

    def state_dict(self) -> dict[str, Any]:
        """As `KnotPolicy.state_dict`; reads the open window's numbers from their device."""
        if self.values:
            self.values = self._stacked().tolist()  # fp32 survives this, so a resumed window has the same mean
        return super().state_dict()

    def _stacked(self) -> Tensor:
        device = next((x.device for x in self.values if isinstance(x, Tensor)), "cpu")
        return torch.stack([torch.as_tensor(x, dtype=torch.float32, device=device).reshape(()) for x in self.values])

    def _require_valid(self, state: dict[str, Any]) -> None:
        name, values = type(self).__name__, state["values"]
        for count in ("knots", "steps_in_window", "cooling"):
            _positive(name, count, state[count], least=0)
        if not (isinstance(values, list) and all(isinstance(value, float) for value in values)):
            raise ValueError(f"{name}(values={values!r:.80}) must be a list of floats")
        if len(values) > state["steps_in_window"]:
            raise ValueError(
                f"{name}(values={values!r:.80}) must be at most one for each of the window's "
                f"{state['steps_in_window']} steps so far"
            )

    def _require_options(self, state: dict[str, Any], *names: str) -> None:
        made = type(self)(**{name: state[name] for name in names})
        for name in names:
            if getattr(made, name) != state[name]:  # None may stand for a default
                raise ValueError(
                    f"{type(self).__name__}({name}={state[name]!r:.80}) does not go with its other options"
                )

    def _require_number(self, state: dict[str, Any], name: str) -> None:
        # a window's mean may overflow, and a loss may be any float
        value = state[name]
        if not (value is None or is_finite(value) or (isinstance(value, float) and math.isinf(value))):
            raise ValueError(f"{type(self).__name__}({name}={value!r:.80}) must be a number, or None before a window")


class PlateauKnots(_Windows):
    """Tie when the loss of the live link improves much more slowly than it did.

    The link's progress is the fall of the mean loss over the last three windows. It ties when this is below ``share``
    of the link's best, so a link has five windows or more. Where the noise of a window's mean hides its progress, this
    happens after six windows or so: with ``total_steps`` such a run has about 16 links.

    With ``patience`` or ``threshold`` it ties when the loss has stopped improving, in the words of
    `torch.optim.lr_scheduler.ReduceLROnPlateau`: after more than ``patience`` windows without a relative improvement of
    ``threshold`` on the link's best window. A loss that keeps falling, as in most short runs, then ties nothing.

    Args:
        mode: ``"min"`` or ``"max"``.
        patience: windows without improvement to tolerate; None for 3, if ``threshold`` is given.
        threshold: smallest relative improvement that counts; None for 1e-3, if ``patience`` is given.
        window: optimizer steps averaged into one observation; None for a hundredth of ``total_steps``, or 20.
        cooldown: windows to ignore after a knot.
        max_links: largest length of the chain (``max_links − 1`` knots); None for no limit.
        share: of the link's best progress; None for 0.5.
        total_steps: length of the run, if known; the last link then gets at least as many steps as the shortest one
            can have.

    Raises:
        ValueError: an argument is out of range, or ``share`` comes with ``patience`` or ``threshold``.
        RuntimeError: in `update`, if no loss has arrived in the first window.

    >>> slower = [1.0, 0.7, 0.4, 0.1, 0.09, 0.08, 0.07]
    >>> policy = PlateauKnots(window=1)
    >>> [policy.update(Signal(step, loss=torch.tensor(loss))) for step, loss in enumerate(slower, 1)]
    [False, False, False, False, False, True, True]
    """

    def __init__(
        self,
        mode: str = "min",
        patience: int | None = None,
        threshold: float | None = None,
        window: int | None = None,
        cooldown: int = 0,
        max_links: int | None = None,
        share: float | None = None,
        total_steps: int | None = None,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"PlateauKnots(mode={mode!r}): choose 'min' or 'max'")
        super().__init__(window, cooldown, max_links, total_steps)
        self.mode = mode
        self.patience = self.threshold = self.share = None
        if patience is None and threshold is None:
            self.share = _share("PlateauKnots", 0.5 if share is None else share)
        elif share is not None:
            raise ValueError(
                f"PlateauKnots(share={share!r}, patience={patience!r}, threshold={threshold!r}) mixes two rules: give "
                "share, or patience and threshold"
            )
        else:
            threshold = 1e-3 if threshold is None else threshold
            if not (is_finite(threshold) and 0 <= threshold < 1):
                raise ValueError(
                    f"PlateauKnots(threshold={threshold!r}) must be in [0, 1): it is a relative improvement"
                )
            self.patience = _positive("PlateauKnots", "patience", 3 if patience is None else patience, least=0)
            self.threshold = float(threshold)
        self.best: float | None = None  # the best window, or the best progress
        self.bad_windows = 0
        self.means: list[float] = []  # of the last windows
        self.deaf_steps = 0  # steps before the first loss; -1 once it has come

    @property
    def _shortest(self) -> int:
        """The fewest windows after which a link can end."""
        return _SPAN + 2 if self.patience is None else self.patience + 2

    def update(self, signal: Signal) -> bool:
        """True at the end of a window that ends the link."""
        if signal.loss is not None:
            self.deaf_steps = -1
        elif self.deaf_steps >= 0:
            self.deaf_steps += 1  # other policies' knots do not reset this count
            if self.deaf_steps >= self.window:
                raise RuntimeError(
                    f"PlateauKnots has seen {self.deaf_steps} steps (a whole window) and no loss: {_TELL}"
                )
            if self.deaf_steps == 1:
                logger.warning("PlateauKnots saw no loss at the first step: %s", _TELL)
        return self._take(signal.step, None if signal.loss is None else signal.loss.detach(), signal.mean)

    def knotted(self, step: int) -> None:
        """Start judging the next link."""
        super().knotted(step)
        self.best, self.bad_windows, self.means = None, 0, []

    def _judge(self, mean: float) -> bool:
        if self.patience is None:
            return self._slower(mean)
        if self._improves(mean):
            self.best, self.bad_windows = mean, 0
        else:
            self.bad_windows += 1
        return self.bad_windows > self.patience

    def _slower(self, mean: float) -> bool:
        if not math.isfinite(mean):
            return False
        self.means = [*self.means[-_SPAN:], mean]
        if len(self.means) <= _SPAN:
            return False
        progress = (self.means[0] - mean) * (1 if self.mode == "min" else -1)
        if self.best is None:
            self.best = progress
            return False
        self.best = max(self.best, progress)
        return progress < (self.share or 0.0) * self.best or progress <= 0

    def _improves(self, loss: float) -> bool:
        if math.isnan(loss):
            return False
        if self.best is None:
            return True
        margin = (self.threshold or 0.0) * abs(self.best)
        return loss < self.best - margin if self.mode == "min" else loss > self.best + margin

    def _require_valid(self, state: dict[str, Any]) -> None:
        self._require_options(
            state, "mode", "patience", "threshold", "window", "cooldown", "max_links", "share", "total_steps"
        )
        super()._require_valid(state)
        _positive("PlateauKnots", "bad_windows", state["bad_windows"], least=0)
        _positive("PlateauKnots", "deaf_steps", state["deaf_steps"], least=-1)
        self._require_number(state, "best")
        means = state["means"]
        if not (isinstance(means, list) and len(means) <= _SPAN + 1 and all(map(is_finite, means))):
            raise ValueError(f"PlateauKnots(means={means!r:.80}) must be a list of at most {_SPAN + 1} numbers")


#: windows over which `PlateauKnots` measures progress
_SPAN = 3


class GapKnots(_Windows):
    """Tie when the live link's first-order gain has fallen below a share of its best.

    The gain is the squared norm of the gradient of B (of A, if only A is trained): how fast a gradient step on B lowers
    the loss. A fresh link has fresh directions, and the live link's best window, usually its first, shows what these
    give. The noise of batches would add to a squared norm, so the policy takes the product of the gradients of two
    successive steps, whose mean has no noise in it. Single windows have: choose one long enough. A layer without a
    gradient in one of the two steps, as an idle expert, is left out of their product.

    It keeps a copy of that gradient, and clipped gradients show it little. Checkpoints leave the copy out, so a resumed
    run misses one product and may tie later than the run that was not stopped.

    Args:
        share: of the link's best window.
        window, cooldown, max_links, total_steps: as for `PlateauKnots`.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: in `update`, if the signal has no ``opt``.
    """

    def __init__(
        self,
        share: float = 0.5,
        window: int | None = None,
        cooldown: int = 0,
        max_links: int | None = None,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(window, cooldown, max_links, total_steps)
        self.share = _share("GapKnots", share)
        self.best: float | None = None
        self._last: dict[str, Tensor] = {}  # a checkpoint leaves it out, and the next product is missing then

    @property
    def _shortest(self) -> int:
        """The fewest windows after which a link can end."""
        return 2

    def update(self, signal: Signal) -> bool:
        """True at the end of a window that ends the link."""
        if signal.opt is None:
            raise RuntimeError("GapKnots needs signal.opt, which ChainOptimizer gives: it reads the link's gradients")
        last, self._last = self._last, {path: grad.clone() for path, grad in signal.opt.live.gradients().items()}
        # every process of a distributed run gives a number, on the device that it trains on
        gain = torch.full((), math.nan, device=next((grad.device for grad in self._last.values()), "cpu"))
        pairs = [(last[path], grad) for path, grad in self._last.items() if path in last]
        if pairs and all(a.shape == b.shape for a, b in pairs):
            products = [torch.sum(a.double() * b.double()) for a, b in pairs]
            gain = torch.stack([product.to(products[0].device) for product in products]).sum()
        return self._take(signal.step, gain, signal.mean)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `KnotPolicy.load_state_dict`; the next product is missing."""
        super().load_state_dict(state)
        self._last = {}

    def knotted(self, step: int) -> None:
        """Start judging the next link."""
        super().knotted(step)
        self.best, self._last = None, {}

    def _judge(self, mean: float) -> bool:
        if not math.isfinite(mean):
            return False
        if self.best is None:
            self.best = mean
            return False
        self.best = max(self.best, mean)
        return mean < self.share * self.best or mean < 0

    def _require_valid(self, state: dict[str, Any]) -> None:
        self._require_options(state, "share", "window", "cooldown", "max_links", "total_steps")
        super()._require_valid(state)
        self._require_number(state, "best")


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

    def _wants_one_link(self) -> bool:
        return self.decide([not self.first._wants_one_link(), not self.second._wants_one_link()]) is False

    def _name(self) -> str:
        return f"({self.first._name()} {self.word} {self.second._name()})"

    def _why(self, step: int) -> str:
        return self.first._why(step) or self.second._why(step)

    def state_dict(self) -> dict[str, Any]:
        return {"policy": type(self).__name__, "first": self.first.state_dict(), "second": self.second.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._require_own(state)
        copy.deepcopy(self.first).load_state_dict(state["first"])  # a rehearsal, so that a refusal changes neither
        self.second.load_state_dict(state["second"])
        self.first.load_state_dict(state["first"])

    def _settings(self) -> str:
        return f"{self.first._settings()} {self.word} {self.second._settings()}"

    def __repr__(self) -> str:
        return f"({self.first!r} {self.word} {self.second!r})"


class _Either(_Pair):
    word, decide = "|", any


class _Both(_Pair):
    word, decide = "&", all


def _share(policy: str, value: Any) -> float:
    if not (is_finite(value) and 0 < value < 1):
        raise ValueError(f"{policy}(share={value!r}) must be between 0 and 1")
    return float(value)


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


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (
        isinstance(value, (int, float, str)) and type(value) is type(default) and value == default
    )


def _is_json(value: Any) -> bool:
    """Whether ``value`` survives JSON (tuples as lists)."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
