"""Passes the optimizer settings in `TrainingArguments` to a base optimizer."""

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from cola import ChainOptimizer

logger = logging.getLogger("cola")

#: fields of `TrainingArguments`, and an optimizer's keyword argument for each
_SETTINGS = {
    "learning_rate": "lr", "weight_decay": "weight_decay",
    "adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps",
}  # fmt: skip


def base_arguments(args: TrainingArguments, base: Callable[..., Optimizer], given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ``base`` from a trainer's arguments, if its signature names them.

    ``learning_rate``, ``weight_decay`` and the entries of ``optim_args`` go to every base; ``adam_beta1``,
    ``adam_beta2`` and ``adam_epsilon`` to a base with two ``betas``.

    Args:
        args: the trainer's.
        base: as for `ChainOptimizer`. Arguments bound by a `functools.partial` stay.
        given: the caller's own arguments, which win.

    Raises:
        ValueError: ``optim_args`` has an entry that ``base`` does not take, or that is neither a number nor a boolean.

    >>> import torch
    >>> args = TrainingArguments(use_cpu=True, learning_rate=0.1, weight_decay=0.01, optim_args="momentum=0.9")
    >>> base_arguments(args, torch.optim.SGD, {"weight_decay": 0.5})
    {'lr': 0.1, 'momentum': 0.9}
    """
    try:
        parameters = dict(inspect.signature(base).parameters)
    except (TypeError, ValueError):
        parameters = {}
    found: dict[str, Any] = {}
    if "lr" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        found["lr"] = args.learning_rate
    if "weight_decay" in parameters:
        found["weight_decay"] = args.weight_decay
    betas = parameters["betas"].default if "betas" in parameters else None
    if isinstance(betas, tuple) and len(betas) == 2:
        found["betas"] = (args.adam_beta1, args.adam_beta2)
        if "eps" in parameters and isinstance(parameters["eps"].default, float):
            found["eps"] = args.adam_epsilon
    found.update(_optim_args(args.optim_args, parameters, base))
    bound = base.keywords if isinstance(base, functools.partial) else {}
    return {name: value for name, value in found.items() if name not in given and name not in bound}


def spare_from_decay(trainer: Trainer, opt: ChainOptimizer) -> None:
    """Exempt trained biases and norms from weight decay, as the trainer's own optimizer does.

    They get a separate group if other parameters of their group decay.
    """
    if len(opt.base.param_groups) < 2:
        return
    group, decays = opt.base.param_groups[1], set(trainer.get_decay_parameter_names(trainer.model))
    decayed = {id(p) for name, p in trainer.model.named_parameters() if name in decays}
    spared = [p for p in group["params"] if id(p) not in decayed]
    if len(spared) == len(group["params"]):
        group["weight_decay"] = 0.0
    elif spared:
        group["params"] = [p for p in group["params"] if id(p) in decayed]
        opt.base.add_param_group({"params": spared, "weight_decay": 0.0})


def say_what_is_not_used(args: TrainingArguments, base: Callable[..., Optimizer], known: Iterable[str]) -> None:
    """Warn of settings in a trainer's arguments that ``base`` does not get among its ``known`` keyword arguments."""
    name = getattr(base, "__name__", repr(base))
    if args.optim != _default("optim"):
        logger.warning("optim=%r is not used: attach was given the base optimizer %s", str(args.optim.value), name)
    found = {*known, *(base.keywords if isinstance(base, functools.partial) else ())}
    values = {setting: getattr(args, setting) for setting, keyword in _SETTINGS.items() if keyword not in found}
    dropped = ", ".join(f"{setting}={v!r}" for setting, v in values.items() if v != _default(setting))
    if dropped:
        logger.warning(
            "TrainingArguments(%s) is not used: the signature of the base optimizer %s has no place for it. Set it "
            "in the base itself",
            dropped,
            name,
        )


def _default(setting: str) -> Any:
    return TrainingArguments.__dataclass_fields__[setting].default


def _optim_args(text: str | None, parameters: Mapping[str, inspect.Parameter], base: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in (text or "").replace(" ", "").split(","):
        name, _, value = entry.partition("=")
        if not name:
            continue
        if name not in parameters:
            raise ValueError(
                f"optim_args={text!r} has {name!r}, which base={getattr(base, '__name__', base)!s:.80} does not take: "
                "leave it out, or give attach another base"
            )
        words = {"true": True, "false": False, "none": None}
        if value.lower() in words:
            found[name] = words[value.lower()]
            continue
        try:
            found[name] = int(value) if value.lstrip("+-").isdigit() else float(value)
        except ValueError:
            raise ValueError(
                f"optim_args={text!r}: {name}={value!r} is neither a number nor true or false; give {name}= to attach"
            ) from None
    return found
