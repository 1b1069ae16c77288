"""Trains a chain in Lightning: make the ChainOptimizer in the module's ``__init__``, and add the callback `ChainKnots`.

In ``configure_optimizers`` it would be too late: Lightning has loaded a checkpoint's weights by then, which include the
live link.

>>> import lightning
>>> import torch
>>> from cola import ChainOptimizer, EpochKnots, LinkConfig
>>> class Lit(lightning.LightningModule):
...     def __init__(self):
...         super().__init__()
...         self.net = torch.nn.Linear(4, 1)
...         link = LinkConfig(r=1, target_modules="all-linear")
...         self.chain_optimizer = ChainOptimizer(torch.optim.AdamW, self.net, policy=EpochKnots(at=[1]), link=link)
...
...     def configure_optimizers(self):
...         return self.chain_optimizer
...
...     def training_step(self, batch, index):
...         return self.net(batch).square().mean()
>>> ChainKnots().state_dict()
{}
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.optim import Optimizer

from cola import ChainOptimizer, KnotReport
from cola.knot.sharded import tie_anywhere
from cola.lora.config import LayerPlan
from cola.lora.kinds import is_quantized, known_kind
from cola.lora.layer import FACTORS
from cola.lora.link import used_rank
from cola.lora.parameter import ParameterView, view_of


class ChainKnots(Callback):
    """Tells the policies of a module's chains loss and epoch, logs knots, and finishes the chains when ``fit`` ends.

    The loss is the mean of the losses backpropagated for a step, whether Lightning accumulates them or the module does
    (``manual_backward(loss / n)``: the division by an integer is undone). Knots appear as ``knot_rank``,
    ``knot_delta_norm`` and ``knot_lost_norm`` in the trainer's loggers, at the step before the knot.

    The finished module can also load a checkpoint from the middle of its run, e.g. by
    ``trainer.test(ckpt_path="best")``. The checkpoint's live link is then merged into its weights.

    Args:
        finish: tie the last links at the end; False leaves that to ``opt.finish()``.
    """

    def __init__(self, *, finish: bool = True) -> None:
        self.finish = finish
        self.reports: list[KnotReport] = []
        self.losses: list[tuple[Tensor, float]] = []  # of the coming step, each with its divisor

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the chains' knots; refuse DeepSpeed, which would undo them."""
        if "deepspeed" in type(trainer.strategy).__name__.lower():
            raise ValueError(
                "strategy: DeepSpeed's optimizer keeps its own copy of the parameters and would undo every knot: use "
                "'ddp', or FSDP2 in your own loop (experiments/examples)"
            )
        for opt in _chains(trainer):
            opt.on_knot(self.reports.append)
            opt._integrated = True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss."""
        scaler, node, value = getattr(trainer.precision_plugin, "scaler", None), loss.grad_fn, loss.detach()
        if scaler is not None:
            node, value = node and node.next_functions[0][0], value / scaler._get_scale_async()
        divisor = trainer.accumulate_grad_batches if pl_module.automatic_optimization else _divisor(node)
        self.losses.append((value, divisor))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Tell the policy the step's loss, and the number of epochs after the coming step."""
        losses, self.losses = self.losses, []
        if not isinstance(optimizer, ChainOptimizer):
            return
        if losses:
            total = torch.stack([value for value, _ in losses]).sum()
            optimizer._optimised(total / sum(1 / divisor for _, divisor in losses))
        if isinstance(trainer.num_training_batches, int):
            done = trainer.fit_loop.epoch_loop.batch_idx + 1
            optimizer.observe(epoch=trainer.current_epoch + done / trainer.num_training_batches)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log the step's knots."""
        self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tie the last links."""
        if self.finish:
            for opt in _chains(trainer):
                opt.finish()
                _take_links(opt)
            self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        for report in self.reports:
            norms = {"knot_delta_norm": report.delta_norm, "knot_lost_norm": report.lost_norm}
            values = {"knot_rank": float(report.rank), **norms}
            for logger in trainer.loggers:
                logger.log_metrics(values, report.step)
        self.reports.clear()


def _chains(trainer: Trainer) -> list[ChainOptimizer]:
    optimizers = [o.optimizer if isinstance(o, LightningOptimizer) else o for o in trainer.optimizers]
    return [opt for opt in optimizers if isinstance(opt, ChainOptimizer)]


def _divisor(node: Any) -> float:
    """The integer that a loss was divided by, or 1."""
    other = getattr(node, "_saved_other", None) if node is not None and node.name() == "DivBackward0" else None
    if isinstance(other, Tensor):
        other = other.item() if other.numel() == 1 and other.device.type == "cpu" else None
    return other if other is not None and other > 1 and other == int(other) else 1


def _take_links(opt: ChainOptimizer) -> None:
    """Let the finished layers load weights that include a link."""
    for path, layer in opt.live.layers.items():
        if isinstance(layer, nn.Module) and not is_quantized(layer):  # PEFT's layers keep a link's entries
            owner, parameter = layer.place if isinstance(layer, ParameterView) else (layer, None)
            merges = _MergesLink(parameter, opt.live.plans[path], opt.live.index + 1)
            owner.register_load_state_dict_pre_hook(merges)


class _MergesLink:
    """A hook that merges a state dict's link into its weight.

    Args:
        parameter: name of the weight, if the link goes on a parameter; None if it goes on the module.
        plan: the layer's.
        links: how many the run had.
    """

    def __init__(self, parameter: str | None, plan: LayerPlan, links: int) -> None:
        self.parameter, self.plan, self.links = parameter, plan, links

    @torch.no_grad()
    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        layer = module if self.parameter is None else view_of(module, self.parameter)
        names = FACTORS if self.parameter is None else view_of(module, self.parameter).names
        A, B = (state.pop(f"{prefix}{name}", None) for name in names)
        columns = state.pop(f"{prefix}lora_columns", None)
        if columns is not None and B is not None:
            A = one_hot(columns, known_kind(module).shape(module)[1]).to(B.dtype)
        if A is None or B is None:
            return
        rank = used_rank(A, B)  # a masked link has zeros beyond its rank
        scalings = [self.plan.scaling_of(i) for i in range(self.links) if self.plan.rank_of(i) == rank]
        if rank and not scalings:
            raise ValueError(f"the checkpoint's link on {prefix[:-1]!r} has rank {rank}, and no link of the run has it")
        if rank:
            kind, name = known_kind(layer), f"{prefix}{self.parameter or 'weight'}"
            weight = state[name].clone(memory_format=torch.contiguous_format)
            left, right = kind.sides(layer, A[..., :rank, :], B[..., :rank])
            matrix = weight.view(kind.matrix(layer).shape)
            tie_anywhere(matrix, left, right, scalings[0], rounding="nearest", seed=0, residual=None)
            state[name] = weight
