"""Trains a chain in transformers' `Trainer` and its subclasses (TRL's `SFTTrainer`): call `attach` before `train()`.

trainer = Trainer(model, args, train_dataset=data)
opt = attach(trainer, torch.optim.AdamW, policy=PlateauKnots())
trainer.train()
trainer.save_model("merged")  # the plain model, with the chain in its weights
opt.chain.save("chain")       # the links alone
"""

import functools
import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from cola import ChainOptimizer, KnotPolicy, KnotReport, LinkConfig
from cola.chain import on_disk
from cola.integrations.checkpoints import CHAIN_DIR, watch_checkpoints
from cola.integrations.references import require_fixed_reference, require_no_averaging
from cola.integrations.settings import base_arguments, say_what_is_not_used, spare_from_decay
from cola.lora import quantized
from cola.lora.config import link_config_of
from cola.lora.kinds import is_quantized
from cola.lora.peft import is_peft_model
from cola.lora.stacked import StackedLinear

logger = logging.getLogger("cola")

# the optimizer's state-dict entry for the tied weights of a PEFT model, whose checkpoints hold the adapter alone
_WEIGHTS = "cola_weights"


def attach(
    trainer: Trainer,
    base: Callable[..., Optimizer],
    policy: KnotPolicy,
    *,
    link: LinkConfig = LinkConfig(),  # noqa: B008 (frozen)
    finish: bool = True,
    save_chain: bool = True,
    **kwargs: Any,
) -> ChainOptimizer:
    """Make a `ChainOptimizer` over ``trainer.model`` the trainer's optimizer.

    The policy sees epochs, and the loss that the trainer optimised in the step, whatever computes it (the model,
    ``compute_loss``, ``compute_loss_func``, label smoothing). Knots appear in the log history and wherever the trainer
    reports to (``knot``, ``knot_rank``, ``knot_delta_norm``, ``knot_lost_norm``). ``resume_from_checkpoint`` continues
    bit for bit, from ``checkpoint-N/chain`` if ``save_only_model=True`` left the rest out. ``load_best_model_at_end``
    restores the best weights with their chain. After ``train()`` the model is a plain one (a PeftModel is unloaded)
    with the chain in its weights, and ``trainer.save_model()`` writes it. All of this also holds in several processes,
    under DDP or FSDP2 (``fsdp=True``).

    Args:
        trainer: whose ``train()`` has not been called.
        base, policy, link: as for `ChainOptimizer`, except that ``rank_change="auto"`` means ``"mask"``.
        finish: tie the last link when training ends; False leaves that to ``opt.finish()``.
        save_chain: write the links along with the weights: to ``checkpoint-N/chain`` by ``opt.save`` (by
            ``opt.chain.save`` under FSDP2, where the optimizer's own state drops the links), and finally to
            ``output_dir/chain`` by ``opt.chain.save``.
        **kwargs: for `ChainOptimizer` and ``base``. The trainer's arguments are the defaults: the seed, and, if
            ``base`` names them, ``learning_rate``, ``weight_decay`` (not for biases and norms), ``adam_beta1``,
            ``adam_beta2``, ``adam_epsilon`` and ``optim_args``. A warning names settings that are not used. Frozen
            weights do not decay.

    Returns:
        The optimizer, e.g. for ``opt.chain`` and ``opt.on_knot``.

    Raises:
        TypeError: ``trainer`` is not a Trainer.
        ValueError: a chain cannot work with the trainer's setup; the message says what to use instead.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer={trainer!r:.80} must be a transformers Trainer")
    model, link = _chainable(trainer, finish), link_config_of(link)
    if link.rank_change == "auto":
        link = replace(link, rank_change="mask")  # a checkpoint is loaded into the first link's shapes
    settings = base_arguments(trainer.args, base, kwargs)
    require_fixed_reference(trainer, link)
    say_what_is_not_used(trainer.args, base, {**settings, **kwargs})
    opt = ChainOptimizer(base, model, policy=policy, link=link, **{"seed": trainer.args.seed, **settings, **kwargs})
    if "weight_decay" in settings:
        spare_from_decay(trainer, opt)
    if is_peft_model(model):
        opt.register_state_dict_post_hook(_add_weights)
        opt.register_load_state_dict_pre_hook(_take_weights)
    trainer.optimizer = opt
    watch_checkpoints(trainer, opt)
    trainer.add_callback(ChainCallback(trainer, opt, finish=finish, save_chain=save_chain))
    return opt


class ChainCallback(TrainerCallback):
    """Passes a trainer's events to a `ChainOptimizer`, and knots to the trainer's log. `attach` adds it."""

    def __init__(self, trainer: Trainer, opt: ChainOptimizer, *, finish: bool, save_chain: bool) -> None:
        self.trainer, self.opt = trainer, opt
        self.finish, self.save_chain = finish, save_chain and opt.chain.keep
        self.reports: list[KnotReport] = []
        self.losses: list[Tensor] = []  # of the step's micro-batches
        opt.on_knot(self.reports.append)
        opt._integrated = True
        step = trainer.training_step

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            loss = step(*args, **kwargs)
            self.losses.append(loss.detach())
            return loss

        trainer.training_step = training_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the callbacks that were added since `attach`.

        Raises:
            RuntimeError: an earlier ``train()`` finished the chain.
        """
        if self.opt.finished:
            raise RuntimeError(
                "trainer.train() was called again, and the first call finished the chain: make a new Trainer over the "
                "merged model and attach to it, or use attach(..., finish=False) and call opt.finish() in the end"
            )
        require_no_averaging(self.trainer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a new accumulation window."""
        self.losses.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the policy the step's loss, and the number of epochs after the coming step."""
        if state.global_step >= state.max_steps:  # resumed from the last step, the Trainer takes another one
            self.opt.zero_grad()  # which then does not count
            return
        if self.losses:  # each is a micro-batch's share of the step's loss
            self.opt._optimised(torch.stack(self.losses).sum())
        loader = kwargs.get("train_dataloader")
        try:
            batches = len(loader)  # type: ignore[arg-type]
        except TypeError:
            return  # a stream has no epochs
        steps = math.ceil(batches / args.gradient_accumulation_steps)
        self.opt.observe(epoch=(state.global_step + 1) / steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the losses of a step that the loss scaler skipped."""
        if self.trainer.accelerator.optimizer_step_was_skipped:
            self.opt.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the knots of the step."""
        wanted = control.should_log
        self._log()
        control.should_log = wanted  # logging a knot must not suppress the log of the loss

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the chain into the checkpoint."""
        if self.save_chain and not self.opt.finished and not self.opt.chain.missing:
            directory = Path(self.trainer._get_output_dir(None)) / f"checkpoint-{state.global_step}" / CHAIN_DIR
            if self.trainer.is_fsdp_enabled:  # the sharded model's checkpoint has the live link
                on_disk.save(directory, self.opt.chain._ledger())
            else:
                self.opt.save(directory)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the best checkpoint's chain if its weights were loaded, tie the last link, and restore the model."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.trainer._load_optimizer_and_scheduler(state.best_model_checkpoint)
        if not self.finish:
            return
        self.opt.live.note.unloads = is_peft_model(self.opt.model)
        self.opt.finish()
        self._log()
        if self.save_chain and args.should_save and not self.opt.chain.missing:
            self.opt.chain.save(os.path.join(args.output_dir, CHAIN_DIR))
        if is_peft_model(self.opt.model):
            plain = self.opt.model.unload()  # type: ignore[operator]
            self.trainer.model = self.trainer.model_wrapped = self.trainer.callback_handler.model = plain
        if any(isinstance(module, StackedLinear) for module in self.opt.model.modules()):
            logger.warning(
                "the links are stacked on the quantised weights, where from_pretrained will not look for them: write "
                "them by opt.chain.to_peft (or opt.chain.save), or train with quantized='requantize'"
            )

    def _log(self) -> None:
        of_trl = any(kind.__module__.partition(".")[0] == "trl" for kind in type(self.trainer).__mro__)
        # TRL's log would give the knot its averages, and the loss none
        log = functools.partial(Trainer.log, self.trainer) if of_trl else self.trainer.log
        for report in self.reports:
            norms = {"knot_delta_norm": report.delta_norm, "knot_lost_norm": report.lost_norm}
            entry = {"knot": report.index, "knot_rank": report.rank, **norms}
            log(entry)
        self.reports.clear()


def _chainable(trainer: Any, finish: bool) -> Any:
    """The trainer's model, after checks that a chain can be put on it."""
    if trainer.optimizer is not None:
        raise ValueError(
            "trainer has an optimizer already: leave optimizers= out, and call attach before train() and once"
        )
    if trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError("trainer has optimizer_cls_and_kwargs: give attach the optimizer class as base instead")
    if trainer.lr_scheduler is not None:
        raise ValueError(
            "trainer has an lr_scheduler, which belongs to another optimizer: set lr_scheduler_type, or set "
            "trainer.lr_scheduler to one over the optimizer that attach returns"
        )
    if trainer.model_init is not None:
        raise ValueError("trainer has model_init, which would replace the chained model in train(): give it model=")
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "the trainer uses DeepSpeed, whose optimizer keeps its own copy of the parameters and would undo every "
            "knot: use DDP or FSDP2 (fsdp=True)"
        )
    if trainer.is_fsdp_enabled and not getattr(trainer.accelerator, "is_fsdp2", False):
        raise ValueError(
            "the trainer uses FSDP1, which flattens the parameters: use FSDP2, fsdp_config={'version': 2}, or DDP"
        )
    if trainer.args.load_best_model_at_end and trainer.args.save_only_model:
        raise ValueError("load_best_model_at_end needs the optimizer's state of that step: set save_only_model=False")
    model = trainer.model
    if trainer.is_fsdp_enabled and is_peft_model(model):
        raise ValueError(
            "the model is a PeftModel, and the trainer's FSDP checkpoints hold its adapter alone, without the tied "
            "weights: give it the model without PEFT (link= replaces peft_config), or use DDP"
        )
    checkpointing = getattr(trainer.args, "activation_checkpointing_kwargs", None) or {}
    without_gradient = getattr(model, "main_input_name", "input_ids") != "input_ids"  # transformers handles the others
    if trainer.args.gradient_checkpointing and checkpointing.get("use_reentrant") and without_gradient:
        raise ValueError(
            "use_reentrant=True lets no gradient through to the links, because the model's inputs have none: set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    if getattr(model, "_hf_peft_config_loaded", False) and not is_peft_model(model):
        raise ValueError(
            "the model has an adapter from add_adapter, and the trainer saves the adapter alone, without the tied "
            "weights: use peft.get_peft_model, or the model without an adapter"
        )
    return model


def _add_weights(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
    weights = {
        path: quantized.parts(layer.holder) if is_quantized(layer.holder) else layer.plain_weight.detach()
        for path, layer in opt.live.layers.items()
    }
    return {**state, _WEIGHTS: weights}


@torch.no_grad()
def _take_weights(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
    weights = state.get(_WEIGHTS, {})
    for path, layer in opt.live.layers.items():
        if isinstance(weights.get(path), dict):
            quantized.put_parts(layer.holder, weights[path])
        elif path in weights:
            layer.plain_weight.copy_(weights[path])
    return {name: value for name, value in state.items() if name != _WEIGHTS}
