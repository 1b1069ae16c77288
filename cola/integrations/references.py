"""Checks for preference training and distillation that a knot does not change the reference model."""

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from cola import LinkConfig
from cola.lora import per_layer
from cola.lora.names import modules_by_name
from cola.lora.peft import is_peft_model
from cola.lora.targets import find_peft_layers, find_saved, find_targets

# TRL's callbacks that average the model's parameters into another model, pair by pair
_AVERAGING = ("SyncRefModelCallback", "SyncTeacherModelCallback", "PEFTAdapterEMACallback", "BEMACallback")


def require_fixed_reference(trainer: Any, link: LinkConfig) -> None:
    """Refuse a trainer that computes its reference from weights that knots change.

    Given a PeftModel and no reference model, TRL's trainers use the model with its adapter off. After a knot that is
    the base model with the links tied so far. A separate reference model, reference log-probabilities computed before
    training, and a trainer that needs no reference (``beta=0``) stay exact.

    Raises:
        ValueError: the reference would move; the message names the alternatives.
    """
    model, args = trainer.model, trainer.args
    adapter = is_peft_model(model)
    if adapter and "ref" in getattr(model, "peft_config", {}):
        raise ValueError(
            "the trainer has added the adapter 'ref' to the PeftModel as its reference, and a knot would change the "
            "weights under it: give the trainer ref_model= (DPO, KTO), or merge the adapter first and give it the "
            "plain model"
        )
    if adapter and _takes_the_adapter_off(trainer):
        raise ValueError(
            f"the reference of {type(trainer).__name__} is the PeftModel with its adapter off, which a knot would "
            "change: set ref_model=, or precompute_ref_log_probs=True (DPO, KTO), or beta=0 (GRPO, RLOO), or give the "
            "trainer the plain model without peft_config, so that it loads a separate reference"
        )
    if adapter and getattr(args, "teacher_model_kind", None) == "base":
        raise ValueError(
            "teacher_model_kind='base' is the PeftModel with its adapter off, which a knot would change: give the "
            "trainer the plain model without peft_config, or use teacher_model_kind='live'"
        )
    require_no_averaging(trainer)
    if getattr(args, "use_vllm", False):
        raise ValueError(
            "use_vllm=True sends vLLM the weights without the live link, or merges and unmerges the adapter, which "
            "rounds the frozen weights: set use_vllm=False"
        )
    _require_own_weights(trainer, link)


def require_no_averaging(trainer: Any) -> None:
    """Refuse callbacks that average the model's parameters, because a knot moves factors into the weights.

    Raises:
        ValueError: there is one; the message names it.
    """
    for callback in trainer.callback_handler.callbacks:
        kinds = {kind.__name__ for kind in type(callback).__mro__}
        if not kinds.isdisjoint(_AVERAGING):
            raise ValueError(
                f"{type(callback).__name__} averages the model's parameters, which a knot moves from the factors into "
                "the weights: leave it out (sync_ref_model=False, teacher_model_kind other than 'ema')"
            )


def _takes_the_adapter_off(trainer: Any) -> bool:
    return (
        hasattr(trainer, "ref_model")
        and trainer.ref_model is None
        and not getattr(trainer.args, "precompute_ref_log_probs", False)
        and getattr(trainer, "beta", None) != 0
    )


def _require_own_weights(trainer: Any, link: LinkConfig) -> None:
    """Refuse a trainer with another model that shares weights which knots or training change in place."""
    model = trainer.model
    if trainer.__dict__.get("ref_model") is model:
        raise ValueError("ref_model is the model that is trained: give the trainer a copy of it, or leave it out")
    inside, tuned = modules_by_name(model), find_peft_layers(model)
    narrow = functools.partial(per_layer.narrowed, link)
    layers = {path: inside[path] for path in tuned} or find_targets(
        model, link.target_modules, narrow, link.target_parameters
    )
    whole = [*link.modules_to_save, *per_layer.heads_to_train(link, inside)]
    changed = [layer.weight for layer in layers.values()]
    changed += [p for module in find_saved(model, whole, layers) for p in module.parameters()]
    places = {_place(weight) for weight in changed if isinstance(weight, Tensor)} - {0}
    for name, other in _other_models(trainer):
        for path, weight in other.named_parameters():
            if _place(weight) in places:
                raise ValueError(
                    f"{name} shares the weight {path!r} with the model, and a knot would change both: give the trainer "
                    "a copy (copy.deepcopy, without num_shared_layers), or leave that layer out of target_modules"
                )


def _other_models(trainer: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, value in vars(trainer).items():
        if isinstance(value, nn.Module) and value is not trainer.model and value is not trainer.model_wrapped:
            yield name, value


def _place(weight: Tensor) -> int:
    """The address of a tensor's values; 0 on the meta device."""
    local = getattr(weight, "_local_tensor", weight)
    return 0 if local.device.type == "meta" else local.untyped_storage().data_ptr()
