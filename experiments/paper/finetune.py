"""Run one cell of the paper's experiments: fine-tune with transformers' `Trainer`, keep the best epoch, score it.

The protocol has shuffled epochs, a learning rate that falls linearly to zero without a warm-up, gradients clipped at
norm 1 and no weight decay. The development loss is measured after every epoch, and the weights of the epoch where it is
lowest are kept. In-context learning and zero-shot prompting train nothing and are scored in the same way.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from cola import ChainOptimizer, KnotError
from cola.integrations.transformers import CHAIN_DIR, attach
from experiments import models, tasks
from experiments.methods import BASES
from experiments.paper.cells import Cell
from experiments.paper.encoding import Encoder, Tokenizer, window
from experiments.paper.objectives import LOSSES, Collator, Example, examples, objective_of, unwrapped
from experiments.paper.scoring import DEMONSTRATIONS, Score, dev_loss, evaluate
from experiments.sweep import SCRATCH, Outcome
from experiments.sweep.processes import processes
from experiments.tasks.loading import Splits, split

_WHOLE = "whole"  # the file that completes a checkpoint


def run(cell: Cell, folder: Path) -> Outcome:
    """Run a cell; a chain is left in ``folder/chain``.

    A run that was killed goes on from its last epoch, bit for bit. If it was killed between the end of training and the
    outcome, it is only scored again.

    Args:
        cell: the run.
        folder: for the chain, and for checkpoints in `sweep.SCRATCH`, which a sweep removes once it has the outcome.

    Returns:
        ``test`` and, if the method trains, ``dev``: scores in per cent; ``metrics``: all metrics of each;
        ``dev_loss_by_epoch``, ``best_epoch`` (from 1), ``losses`` (per optimizer step), ``knots`` (step, rank, norm),
        ``steps``, ``parameters`` (trainable at once), ``tokens_by_link`` (trained on, without padding);
        or ``diverged``, the reason.

    Raises:
        FileNotFoundError, OSError, ValueError: the model or the data cannot be loaded, or do not fit the cell.
    """
    task = tasks.task(cell.task)
    models.require(cell.model)  # before the data is loaded
    # without training only the test pool is needed
    sizes = (cell.train, cell.dev) if cell.method.trains else (0, 0)
    splits = split(task, cell.seed, *sizes, cell.test, cell.data_dir)
    model, tokenizer = models.load(
        cell.model,
        _weights(cell),
        gradient_checkpointing=cell.gradient_checkpointing and cell.method.trains,
        device_map=cell.device_map,
    )
    length = min(cell.max_length, window(model.config))

    def score(model: nn.Module, samples: Any, demonstrations: Any = ()) -> Score:
        return evaluate(
            model, tokenizer, task, samples, batch_size=cell.batch, demonstrations=demonstrations, max_length=length
        )

    if not cell.method.trains:
        shown = cell.method.kind == "icl"
        solved = split(task, cell.seed, DEMONSTRATIONS, 0, 1, cell.data_dir).train if shown else ()
        test = score(model, splits.test, solved)
        return {"test": test.value, "metrics": {"test": _metrics(test)}}
    if not splits.dev:
        raise ValueError(f"dev={cell.dev}: {task.name} has no development samples to choose an epoch by")
    try:
        model, outcome = _train(cell, folder / SCRATCH, model, tokenizer, splits, length)
    except (FloatingPointError, KnotError) as error:
        return {"diverged": str(error)}
    dev, test = score(model, splits.dev), score(model, splits.test)
    if int(os.environ.get("RANK", "0")) == 0:
        _keep_chain(folder)
    return {"test": test.value, "dev": dev.value, "metrics": {"test": _metrics(test), "dev": _metrics(dev)}, **outcome}


def _weights(cell: Cell) -> str:
    """The dtype of the weights: mixed precision trains them in fp32."""
    if cell.method.trains:
        return "float32" if cell.dtype in ("float16", "bf16-mixed") else cell.dtype
    return "bfloat16" if cell.dtype == "bf16-mixed" else cell.dtype


def training_arguments(cell: Cell, folder: Path, micro_batch: int) -> TrainingArguments:
    """The protocol as transformers' arguments.

    Args:
        cell: of the run.
        folder: for checkpoints.
        micro_batch: examples per forward pass of a process, a divisor of its share of the batch; gradients are
            accumulated over a batch.

    Raises:
        ValueError: float16 without a GPU.
    """
    gpu = torch.cuda.is_available()
    if cell.dtype == "float16" and not gpu:
        raise ValueError("dtype='float16' trains in mixed precision, which needs a GPU: use float32 or bf16-mixed")
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=cell.epochs,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=cell.batch // (processes() * micro_batch),
        learning_rate=cell.lr,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=1.0,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,  # with the protocol's 1, the last checkpoint would go before the next is complete
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        seed=cell.seed,
        fp16=cell.dtype == "float16",
        bf16=cell.dtype == "bf16-mixed",
        use_cpu=not gpu,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["option_len"],
        # for the 7B model; off on one process
        fsdp=cell.fsdp,
        fsdp_config={"version": 2} if cell.fsdp else None,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # otherwise every visible GPU gets a micro-batch, and the batch is not the cell's
    return arguments


def micro_batch(task_size: int, batch: int) -> int:
    """Examples per forward pass: the largest divisor of ``batch`` up to the task's number.

    >>> micro_batch(2, 8), micro_batch(8, 8), micro_batch(8, 4), micro_batch(4, 6)
    (2, 8, 4, 3)
    """
    return next(size for size in range(min(task_size, batch), 0, -1) if batch % size == 0)


class _Examples(Dataset[Example]):
    def __init__(self, items: list[Example]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]


class TaskTrainer(Trainer):
    """A `Trainer` that trains the protocol's objective and evaluates the loss on the development set.

    Args:
        objective: model, batch -> loss.
        dev: model -> loss on the development set.
        **kwargs: for `Trainer`.

    Attributes:
        chain: the chain's optimizer, whose policy is told the losses; None without a chain.
    """

    def __init__(
        self, objective: Callable[[nn.Module, Any], Tensor], dev: Callable[[nn.Module], float], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.objective, self.dev = objective, dev
        self.chain: ChainOptimizer | None = None
        self.model_accepts_loss_kwargs = False  # the objective is a mean over the micro-batch: average it

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective, which is also told to a chain's policy.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        loss = self.objective(model, inputs)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} after {self.state.global_step} steps")
        if model.training and self.chain is not None:
            self.chain.observe(loss.detach())
        return (loss, None) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss on the development set.

        Raises:
            FloatingPointError: it is not finite.
        """
        loss = self.dev(self.model)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the development loss is {loss} after {self.state.global_step} steps")
        metrics = {"eval_loss": loss}
        self.log(metrics)
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics


def _train(
    cell: Cell, scratch: Path, model: nn.Module, tokenizer: Tokenizer, splits: Splits, length: int
) -> tuple[nn.Module, Outcome]:
    """Fine-tune, and return the plain model of the best epoch with the outcome."""
    task, method = tasks.task(cell.task), cell.method
    objective, encoder = objective_of(task), Encoder(tokenizer, length)
    items = examples(task, splits.train, encoder, objective)
    per_epoch = math.ceil(len(items) / cell.batch)
    total = cell.epochs * per_epoch
    if method.kind == "cola" and method.knots in ("epochs", "even") and method.links > total:
        raise ValueError(f"links={method.links} in {total} steps: a link needs at least one")
    if cell.batch % processes():
        raise ValueError(f"batch={cell.batch} cannot be shared by {processes()} processes: use a multiple")
    base, base_kwargs = BASES[method.base], method.base_kwargs(cell.lr)
    trainer = TaskTrainer(
        LOSSES[objective],
        lambda model: dev_loss(model, tokenizer, task, splits.dev, batch_size=cell.batch, max_length=length),
        model=model,
        args=training_arguments(cell, scratch, micro_batch(task.micro_batch, cell.batch // processes())),
        train_dataset=_Examples(items),
        eval_dataset=_Examples([]),
        data_collator=Collator(tokenizer.pad_token_id or 0, share=not _drops_out(model)),
        optimizer_cls_and_kwargs=None if method.adapts else (base, base_kwargs),
    )
    if cell.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError("fsdp=True: start several processes by torchrun, on GPUs; Accelerate does not shard on CPUs")
    trainer.remove_callback(PrinterCallback)
    if method.adapts:
        policy = method.policy(cell.epochs, per_epoch, told=True)
        link = method.link(list(cell.targets) or None, bias=cell.bias)
        trainer.chain = attach(trainer, base, policy, link=link, **base_kwargs)
    trainer.add_callback(_Whole(trainer))  # after the chain's callback, which also writes into the checkpoint
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trainer.train(resume_from_checkpoint=_last_whole(trainer, scratch))
    trainer.accelerator.wait_for_everyone()  # the first process is about to remove the checkpoints
    history = trainer.state.log_history
    ties = [entry for entry in history if "knot" in entry and entry["step"] < total]
    by_epoch = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return trainer.model, {
        "dev_loss_by_epoch": by_epoch,
        "best_epoch": 1 + by_epoch.index(min(by_epoch)),
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "knots": [{"step": tie["step"], "rank": tie["knot_rank"], "norm": tie["knot_delta_norm"]} for tie in ties],
        "steps": trainer.state.global_step,
        "parameters": parameters,
        "tokens_by_link": _by_link(items, [tie["step"] for tie in ties], per_epoch, total),
    }


def _drops_out(model: nn.Module) -> bool:
    """Whether the model has dropout: then candidates have masks of their own, and no context is shared."""

    def drops(settings: Mapping[str, Any]) -> bool:
        return any(
            drops(value)  # of a part, such as text_config
            if isinstance(value, Mapping)
            else isinstance(value, int | float) and value > 0 and "drop" in str(name)  # resid_pdrop, layerdrop, …
            for name, value in settings.items()
        )

    return drops(unwrapped(model).config.to_dict())


class _Whole(TrainerCallback):
    """Marks a checkpoint once every process has written its part."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if args.should_save:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()


def _last_whole(trainer: Trainer, scratch: Path) -> str | None:
    """The last complete checkpoint; the first process removes incomplete ones."""
    found = {int(path.name.partition("-")[2]): path for path in scratch.glob("checkpoint-*")}
    whole = [step for step, path in found.items() if (path / _WHOLE).exists()]
    trainer.accelerator.wait_for_everyone()  # all have listed the checkpoints
    if trainer.args.should_save:
        for step in found.keys() - whole:
            shutil.rmtree(found[step])
    return str(found[max(whole)]) if whole else None


def _by_link(items: list[Example], knots: list[int], per_epoch: int, total: int) -> list[int]:
    """Tokens read in training, per link: exact if knots are at the ends of epochs, else in proportion to the steps."""
    # a text's last token is predicted but not read
    in_epoch = sum(len(text.ids) - 1 for item in items for text in item.texts)
    ends = [*knots, total]
    return [round(in_epoch * (end - start) / per_epoch) for start, end in zip([0, *ends], ends)]


def _metrics(score: Score) -> dict[str, float]:
    return {score.metric: score.value, **score.extra}


def _keep_chain(folder: Path) -> None:
    """Move the chain out of the checkpoints' folder; a resumed run writes it again."""
    chain, kept = folder / SCRATCH / CHAIN_DIR, folder / CHAIN_DIR
    if chain.is_dir():
        shutil.rmtree(kept, ignore_errors=True)
        chain.replace(kept)
