"""Run one cell: one model, task, method, learning rate and seed, and print its score.

    python -m experiments run --task RTE --method cola --links 3 --lr 1e-3
    python -m experiments run --model tiny --data-dir DIR --task CB --method lora --lr 1e-3 --seed 1
    torchrun --nproc-per-node 4 -m experiments run --model meta-llama/Llama-2-7b-hf --fsdp …

The outcome is kept with those of the tables: a cell that a table has run is not run again, and vice versa. By default
the precision is that of the tables, and so are batch size and biases for the paper's two models.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from experiments import tasks
from experiments.command_line import add_offline, count, positive, seed
from experiments.methods import BASES, KINDS, NAMED_KNOTS, OUTSIDE_TRAINER, Method
from experiments.paper import cells, tables
from experiments.paper.cells import Cell
from experiments.paper.published import protocol
from experiments.sweep import Sweep, SweepError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m experiments run`."""
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), metavar="DIR", help="folder to write")
    parser.add_argument(
        "--model", default="facebook/opt-1.3b", metavar="MODEL", help="a folder, a hub name, tiny or smollm2"
    )
    parser.add_argument("--task", required=True, metavar="TASK", help=f"one of {', '.join(tasks.TASKS)}")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of data and draws")

    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        required=True,
        choices=[kind for kind in KINDS if kind not in OUTSIDE_TRAINER],
        help="how the model is trained or prompted",
    )
    method.add_argument("--base", choices=list(BASES), default="AdamW", help="base optimizer")
    method.add_argument("--lr", type=positive, metavar="RATE", help="peak learning rate; needed if the method trains")
    method.add_argument(
        "--ranks", type=count, nargs="+", default=[8], metavar="R", help="of the links; the last repeats"
    )
    method.add_argument("--links", type=count, metavar="N", help="length of the chain (default: 3; 1 for lora)")
    method.add_argument("--knots", default="epochs", metavar="POLICY",
                        help=f"{', '.join(NAMED_KNOTS)}, at=STEP,… or every=STEPS")  # fmt: skip
    method.add_argument("--alpha", type=positive, default=16.0, metavar="A", help="scale = alpha / first rank")
    method.add_argument(
        "--bias",
        action=argparse.BooleanOptionalAction,
        help="train the adapted layers' biases (default: only for the paper's OPT)",
    )

    sizes = parser.add_argument_group("sizes", "the defaults are the paper's")
    sizes.add_argument("--train", type=count, default=1000, metavar="N", help="training examples")
    sizes.add_argument("--dev", type=count, metavar="N", help="development examples (default: the task's)")
    sizes.add_argument("--test", type=count, default=1000, metavar="N", help="test examples")
    sizes.add_argument("--epochs", type=count, default=5, metavar="N", help="passes")
    sizes.add_argument("--batch", type=count, metavar="N",
                       help="examples per optimizer step (default: 8; 4 for the paper's Llama)")  # fmt: skip
    cells.add_arguments(parser)
    add_offline(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m experiments run`: 0; 1 if the run diverged; 2 for bad arguments."""
    try:
        cell = make_cell(arguments)
        from experiments.paper.finetune import run  # slow, so after the arguments have been looked at

        sweep = Sweep(arguments.out, run, cells.name)
        outcome = sweep.carry_out(lambda done: [cell], workers=1, progress=False)[cell]
    except (OSError, ValueError) as error:
        print(f"run: {error}", file=sys.stderr)
        return 2
    except SweepError as error:
        print(f"run: {error}", file=sys.stderr)
        return 1
    if int(os.environ.get("RANK", "0")) == 0:
        print(cells.name(cell))
        print(json.dumps({name: value for name, value in outcome.items() if name != "losses"}, indent=1))
        print(sweep.place(cell))
    return 1 if "diverged" in outcome else 0


def make_cell(arguments: argparse.Namespace) -> Cell:
    """The cell that the arguments describe.

    Raises:
        ValueError: an invalid cell.
    """
    kind, links = arguments.method, arguments.links
    if links is None:
        links = 3 if kind == "cola" else 1
    if arguments.lr is None and kind not in ("icl", "zero-shot"):
        raise ValueError(f"--method {kind} trains: give its peak learning rate, such as --lr 1e-3")
    method = Method(kind, arguments.base, tuple(arguments.ranks), links, arguments.knots, arguments.alpha)
    facts = protocol()
    of_the_paper = next((name for name, hub in tables.HUB.items() if hub == arguments.model), None)
    batch, bias = arguments.batch, arguments.bias
    if batch is None:
        batch = facts.batch.get(of_the_paper or "", 8)
    if bias is None:
        bias = facts.adapter_bias.get(of_the_paper or "", False)
    return Cell(
        model=arguments.model,
        task=tasks.task(arguments.task).name,
        method=method,
        lr=(arguments.lr or 0.0) if method.trains else 0.0,
        seed=arguments.seed,
        train=arguments.train,
        dev=arguments.dev,
        test=arguments.test,
        epochs=arguments.epochs,
        batch=batch,
        bias=bias and method.adapts,
        **cells.circumstances(arguments),
    )
