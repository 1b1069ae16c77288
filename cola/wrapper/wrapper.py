"""An optimizer that is composed of another: its groups, state and defaults are the other's own objects.

A facade is refused by schedulers and frameworks (they ask `isinstance`), and a subclass with groups of its own loses
them at `load_state_dict`; properties that delegate pass every contract. The flag by which fused optimizers take over
loss scaling (``_step_supports_amp_scaling``) must never be handed on: what goes with it would land here and not there.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from cola.knot.reset import GroupWatch, adopt, fresh_instance, groups_with, tensors_of
from cola.knot.tie import KnotError


class OptimizerWrapper(Optimizer):
    """What `ChainOptimizer` is without a chain: a `torch.optim.Optimizer` around ``base``, which can be made afresh."""

    base: Optimizer
    _factory: Callable[..., Optimizer]
    _base_kwargs: dict[str, Any]
    _groups: GroupWatch
    _made: int  # groups that the factory has made; later ones came by `add_param_group`

    #: param-group entries of our own, which a new base is not given
    own_entries: tuple[str, ...] = ()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's. Group 0 holds the adapters, group 1 (if any) what is trained beside them."""
        self._settle()
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base's."""
        self.base.zero_grad(set_to_none=set_to_none)

    def train(self) -> None:
        """Pass on to bases that have modes (schedule-free)."""
        self._mode("train")

    def eval(self) -> None:
        """Pass on to bases that have modes (schedule-free)."""
        self._mode("eval")

    # step runs its own hooks; global ones run once, in the base's step

    def _before_step(self, closure: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args: tuple[Any, ...] = (closure,)
        kwargs: dict[str, Any] = {}
        for hook in list(self._optimizer_step_pre_hooks.values()):
            replaced = hook(self, args, kwargs)
            if replaced is not None:
                args, kwargs = replaced
        return args, kwargs

    def _after_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for hook in list(self._optimizer_step_post_hooks.values()):
            hook(self, args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # like torch's optimizers: hooks, and the wrapper that a scheduler puts around step, stay behind
        return {
            name: value
            for name, value in vars(self).items()
            if name != "step" and name != "_listeners" and not name.startswith("_optimizer_")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._listeners: list[Any] = []
        super().__setstate__({})

    # a base made afresh

    def _new_base(self, groups: list[dict[str, Any]]) -> Optimizer:
        """A new base, made as the present one was: groups that came by `add_param_group` are added to it.

        A callable base may keep fewer groups than it is given (one for all), so those are not for it to see.
        """
        added = {id(p) for group in self.base.param_groups[self._made :] for p in group["params"]}
        late = [group for group in groups if any(id(p) in added for p in group["params"])]
        early = [group for group in groups if not any(group is other for other in late)]
        base = self._factory(early or late, **self._base_kwargs)
        for group in late if early else ():
            base.add_param_group(group)
        return base

    def _fresh(self, parameters: list[nn.Parameter]) -> Optimizer:
        """A new base over the groups that hold ``parameters``."""
        groups = groups_with(self.param_groups, parameters)
        return fresh_instance(self._new_base, groups, self._groups.changed, drop=self.own_entries)

    def _adopt(self, fresh: Optimizer, parameters: list[nn.Parameter]) -> None:
        old = tensors_of(self.base, parameters)
        adopt(self.base, fresh, parameters, self._groups.changed)
        kept = {id(t) for t in old} & {id(t) for t in tensors_of(self.base, parameters)}
        if kept:
            raise KnotError(f"{type(self.base).__name__} kept state that it had before the reset: please report it")

    def _reset(self, parameters: list[nn.Parameter]) -> None:
        self._adopt(self._fresh(parameters), parameters)

    # modes

    def _leave_training_mode(self) -> str:
        """Let a base with modes put the parameters that evaluation sees in place; returns the mode to go back to."""
        training = self.param_groups[0].get("train_mode", True)
        self._mode("eval")
        return "train" if training else "eval"

    def _mode(self, mode: str) -> None:
        switch = getattr(self.base, mode, None)
        if callable(switch):
            switch()

    def _settle(self) -> None:
        """Called before the groups are read."""


def require_base(base: Any) -> None:
    """Check the argument ``base`` of `ChainOptimizer`.

    Raises:
        TypeError: it is neither an optimizer class nor a callable.
    """
    if isinstance(base, Optimizer):
        name = type(base).__name__
        raise TypeError(
            f"base={name}(...) is an optimizer instance: pass the class and its arguments, "
            f"ChainOptimizer({name}, model, policy, lr=...)"
        )
    if not callable(base) or (inspect.isclass(base) and not issubclass(base, Optimizer)):
        raise TypeError(f"base={base!r} must be a torch.optim.Optimizer class or a callable params -> Optimizer")
