"""A chain in Lightning: make the ChainOptimizer in the module's ``__init__`` and add `ChainKnots` to the callbacks.

Made later, in ``configure_optimizers``, the link would come after Lightning has loaded a checkpoint's weights, which
hold the live link. Losses reach the policy through the closure that Lightning gives to ``step``.

>>> import lightning
>>> import torch
>>> from cola import ChainOptimizer, EpochKnots, LinkConfig
>>> class Lit(lightning.LightningModule):
...     def __init__(self):
...         super().__init__()
...         self.net = torch.nn.Linear(4, 1)
...         link = LinkConfig(r=1, target_modules="all-linear")
...         self.chain_optimizer = ChainOptimizer(torch.optim.AdamW, self.net, EpochKnots(at=[1]), link=link)
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

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer

from cola import ChainOptimizer, KnotReport


class ChainKnots(Callback):
    """Tells the policies of a module's chains the epoch, logs knots, and finishes the chains when ``fit`` ends.

    Knots appear as ``knot_rank``, ``knot_delta_norm`` and ``knot_lost_norm`` in the trainer's loggers, at the step
    that they follow.

    Args:
        finish: tie the last links at the end; False leaves that to ``opt.finish()``.
    """

    def __init__(self, *, finish: bool = True) -> None:
        self.finish = finish
        self.reports: list[KnotReport] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the chains; refuse what would undo their knots."""
        if "deepspeed" in type(trainer.strategy).__name__.lower():
            raise ValueError(
                "strategy: DeepSpeed's optimizer keeps its own copy of the parameters and would undo every knot: use "
                "'ddp', or FSDP2 in a loop of your own (experiments/examples)"
            )
        for opt in _chains(trainer):
            opt.on_knot(self.reports.append)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Tell the policy how many epochs the coming step completes."""
        if isinstance(optimizer, ChainOptimizer) and isinstance(trainer.num_training_batches, int):
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
            self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        for report in self.reports:
            values = {
                "knot_rank": float(report.rank),
                "knot_delta_norm": report.delta_norm,
                "knot_lost_norm": report.lost_norm,
            }
            for logger in trainer.loggers:
                logger.log_metrics(values, report.step)
        self.reports.clear()


def _chains(trainer: Trainer) -> list[ChainOptimizer]:
    optimizers = [o.optimizer if isinstance(o, LightningOptimizer) else o for o in trainer.optimizers]
    return [opt for opt in optimizers if isinstance(opt, ChainOptimizer)]
