"""An optimizer that wraps another and shares its groups, state and defaults through properties.

It is a `torch.optim.Optimizer`, because schedulers and frameworks check `isinstance`. It has no groups besides the
base's, because `load_state_dict` would replace them. Never forward ``_step_supports_amp_scaling``, the flag of fused
optimizers: GradScaler would set ``grad_scale`` on the wrapper, where the base does not look.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any

from torch import nn
from torch.optim import Optimizer

from cola.knot.reset import GroupWatch, adopt, fresh_instance, groups_with, tensors_of
from cola.knot.tie import KnotError
from cola.lora.config import LinkConfig
from cola.lora.peft_options import require_for_base


class OptimizerWrapper(Optimizer):
    """A `torch.optim.Optimizer` around ``base``, which can be made anew to reset its state."""

    base: Optimizer
    _factory: Callable[..., Optimizer]
    _base_kwargs: dict[str, Any]
    _groups: GroupWatch
    _made: int  # number of groups that the factory made; later ones came by `add_param_group`

    #: the wrapper's param-group entries, which a new base does not get
    _own_entries: tuple[str, ...] = ()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's. Group 0 holds the adapters, group 1 (if any) the extra trained parameters."""
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
        """Call the base's ``train``, if it has modes (schedule-free)."""
        self._mode("train")

    def eval(self) -> None:
        """Call the base's ``eval``, if it has modes (schedule-free)."""
        self._mode("eval")

    # step runs the wrapper's hooks; global hooks run once, in the base's step

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
        # like torch's optimizers, leave out hooks and the wrapper that a scheduler puts around step
        return {
            name: value
            for name, value in vars(self).items()
            if name != "step" and name != "_listeners" and not name.startswith("_optimizer_")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._listeners: list[Any] = []
        super().__setstate__({})

    # a new base

    def _new_base(self, groups: list[dict[str, Any]]) -> Optimizer:
        """A new base, made like the present one: the factory does not see groups that came by `add_param_group`.

        They are added afterwards, because a callable base may merge the groups that it is given.
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
        return fresh_instance(self._new_base, groups, self._groups.changed, drop=self._own_entries)

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
        """Switch a base with modes to the parameters for evaluation; returns the mode to go back to."""
        training = self.param_groups[0].get("train_mode", True)
        self._mode("eval")
        return "train" if training else "eval"

    def _mode(self, mode: str) -> None:
        switch = getattr(self.base, mode, None)
        if callable(switch):
            switch()

    def _settle(self) -> None:
        """A hook that runs before the groups are read."""


def require_base(base: Any, options: Mapping[str, Any], names: Collection[str] = ()) -> None:
    """Raise TypeError if ``base`` is neither an optimizer class nor a callable, or does not take ``options``.

    Args:
        base: the argument.
        options: for the base.
        names: of the ChainOptimizer's own keyword arguments, which may be mistyped among the options.
    """
    if isinstance(base, Optimizer):
        name = type(base).__name__
        raise TypeError(
            f"base={name}(...) is an optimizer instance: pass the class and its arguments, "
            f"ChainOptimizer({name}, model, policy=policy, lr=...)"
        )
    if not callable(base) or (inspect.isclass(base) and not issubclass(base, Optimizer)):
        raise TypeError(f"base={base!r} must be a torch.optim.Optimizer class or a callable params -> Optimizer")
    try:
        taken = inspect.signature(base).parameters
    except (TypeError, ValueError):
        return  # the base decides
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        unknown = {name: value for name, value in options.items() if name not in taken}
        known = [f.name for f in fields(LinkConfig)]
        require_for_base(unknown, known, getattr(base, "__name__", "the base"), [*taken, *names])
