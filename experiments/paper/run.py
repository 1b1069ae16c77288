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
from experiments.methods import BASES, KINDS, Method
from experiments.paper import cells, tables
from experiments.paper.cells import Cell
from experiments.paper.published import protocol
from experiments.sweep import Sweep, SweepError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m experiments run`."""
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="folder to write (default: %(default)s)")
    parser.add_argument("--model", default="facebook/opt-1.3b", help="a folder, a hub name, or tiny (%(default)s)")
    parser.add_argument("--task", required=True, help=f"one of {', '.join(tasks.TASKS)}")
    parser.add_argument("--seed", type=int, default=0, help="of data and draws (default: %(default)s)")

    method = parser.add_argument_group("method")
    method.add_argument("--method", required=True, choices=KINDS, help="how the model is trained or prompted")
    method.add_argument("--base", choices=list(BASES), default="AdamW", help="base optimizer (default: %(default)s)")
    method.add_argument("--lr", type=float, default=0.0, help="peak learning rate; needed if the method trains")
    method.add_argument("--ranks", type=int, nargs="+", default=[8], help="of the links; the last repeats (8)")
    method.add_argument("--links", type=int, help="length of the chain (default: 3; 1 for lora)")
    method.add_argument("--knots", default="epochs", help="epochs, even, plateau, at=STEP,… or every=STEPS (epochs)")
    method.add_argument("--alpha", type=float, default=16.0, help="scale = alpha / first rank (default: %(default)s)")
    method.add_argument(
        "--bias",
        action=argparse.BooleanOptionalAction,
        help="train the adapted layers' biases (default: only for the paper's OPT)",
    )

    sizes = parser.add_argument_group("sizes", "the defaults are the paper's")
    sizes.add_argument("--train", type=int, default=1000, help="training examples (default: %(default)s)")
    sizes.add_argument("--dev", type=int, help="development examples (default: the task's)")
    sizes.add_argument("--test", type=int, default=1000, help="test examples (default: %(default)s)")
    sizes.add_argument("--epochs", type=int, default=5, help="passes (default: %(default)s)")
    sizes.add_argument("--batch", type=int, help="examples per optimizer step (default: 8, for the paper's Llama 4)")
    cells.add_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m experiments run`: 0; 1 if the run diverged; 2 for bad arguments."""
    from experiments.paper.finetune import run

    try:
        cell = make_cell(arguments)
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
        lr=arguments.lr if method.trains else 0.0,
        seed=arguments.seed,
        train=arguments.train,
        dev=arguments.dev,
        test=arguments.test,
        epochs=arguments.epochs,
        batch=batch,
        bias=bias and method.adapts,
        **cells.circumstances(arguments),
    )
