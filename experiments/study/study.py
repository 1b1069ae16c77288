"""The offline study: LoRA, chains and full fine-tuning of a small model on text, with tuned rates and paired seeds.

    python -m experiments study                                                tiny OPT, from code to prose
    python -m experiments study --model DIR --corpus FILE --length 128 --batch 8   any small causal model and text

Per arm the learning rate is chosen on the development split; then every seed is run with it, and only those runs are
evaluated on the test split. A study that was stopped goes on where it was; `--shard` spreads it over machines.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.methods import Method
from experiments.report import stats
from experiments.study import text
from experiments.study.arms import Arm, require_possible
from experiments.study.cells import TARGETS, TINY, Setting, StudyCell, load, name, run
from experiments.sweep.rate_search import RateSearch, gather
from experiments.sweep.sweep import Outcome, Shard, Sweep, SweepError, write_atomically
from experiments.tiny import tiny_opt


def _doubling(first: float, count: int) -> tuple[float, ...]:
    return tuple(first * 2**i for i in range(count))


_ADAM = _doubling(2.5e-4, 9)
_ADAGRAD = _doubling(1e-3, 9)
_SGD = _doubling(0.0125, 12)
_FULL = _doubling(6.25e-5, 8)


def _adam(label: str, method: Method, start: float = 8e-3) -> Arm:
    return Arm(label, method, _ADAM, start)


ARMS: Mapping[str, Arm] = {
    "lora": _adam("LoRA", Method.lora()),
    "cola-2": _adam("COLA, 2 links", Method.cola(2)),
    "cola-3": _adam("COLA, 3 links", Method.cola(3)),
    "cola-5": _adam("COLA, 5 links", Method.cola(5)),
    "cola-plateau": _adam("COLA, plateau", Method.cola(5, knots="plateau")),
    "cola-stepdown": _adam("COLA, ranks 8, 4", Method.cola(2, ranks=(8, 4))),
    "full": Arm("full fine-tuning", Method("finetune"), _FULL, 1e-3),
    "lora-24": _adam("LoRA, rank 24 = 3·8", Method.lora(24)),
    "lora-40": _adam("LoRA, rank 40 = 5·8", Method.lora(40)),
    "lora-16": _adam("LoRA, rank 16 = 2·8", Method.lora(16)),
    "cola-3-16": _adam("COLA, 3 links, rank 16", Method.cola(3, ranks=(16,))),
    "lora-32": _adam("LoRA, rank 32", Method.lora(32)),
    "cola-3-32": _adam("COLA, 3 links, rank 32", Method.cola(3, ranks=(32,))),
    "sgd-lora": Arm("SGD LoRA", Method.lora(base="SGD"), _SGD, 0.1),
    "sgd-cola-3": Arm("SGD COLA, 3 links", Method.cola(3, base="SGD"), _SGD, 0.1),
    "adagrad-lora": Arm("Adagrad LoRA", Method.lora(base="Adagrad"), _ADAGRAD, 1.6e-2),
    "adagrad-cola-3": Arm("Adagrad COLA, 3 links", Method.cola(3, base="Adagrad"), _ADAGRAD, 1.6e-2),
}
"""Name -> arm, in the order of the table."""

REFERENCES: Mapping[str, str] = {
    "cola-3-16": "lora-16",
    "cola-3-32": "lora-32",
    "sgd-cola-3": "sgd-lora",
    "adagrad-cola-3": "adagrad-lora",
}
"""The arm that another is compared with, where it is not plain LoRA: the same rank, or the same base optimizer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m experiments study`."""
    default = Setting()
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder to write (default: %(default)s)")
    parser.add_argument("--model", default=TINY, help="a folder or hub name (default: the repository's tiny OPT)")
    parser.add_argument("--corpus", default=text.PROSE, help="a text file (default: the prose that Python carries)")
    parser.add_argument("--targets", default=default.targets, choices=list(TARGETS), help="layers with adapters")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}; all")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: %(default)s)")
    parser.add_argument("--search-seeds", type=int, default=1, help="seeds per rate tried (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=default.epochs, help="passes (default: %(default)s)")
    parser.add_argument("--train", type=int, default=default.train, help="training blocks (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=default.held_out, help="blocks per split (%(default)s)")
    parser.add_argument("--length", type=int, default=default.length, help="tokens per block (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=default.batch, help="blocks per step (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes (default: as many as cores and memory allow)")
    parser.add_argument("--shard", default="0/1", help="i/n: this machine's part of a sweep in a shared folder")
    parser.add_argument("--smoke", action="store_true", help="two arms, two seeds, a few steps: does everything run?")


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m experiments study`: 0; 1 if a run that counts diverged or is missing; 2 for bad arguments or
    arms that the model cannot carry."""
    tiny_opt.quiet()
    try:
        searches, shard = make_plan(arguments), Shard.parse(arguments.shard)
        first = next(iter(searches.values()))
        setting = first.cell(first.rates[0], first.seeds[0]).setting
        setting.blocks()
        require_possible(
            {arm: ARMS[arm] for arm in searches},
            load(setting.model),
            lambda arm, model: StudyCell(setting, arm.method, arm.start, 0).optimizer(model),
        )
    except (ValueError, OSError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    mine = {arm: search for index, (arm, search) in enumerate(searches.items()) if shard.has(index)}
    sweep = Sweep(arguments.out, run, name)
    per_arm = 2 + arguments.search_seeds * 3 + 2 * arguments.seeds  # three rates or a few more, then seeds and tests
    try:
        sweep.carry_out(
            lambda done: [cell for search in mine.values() for cell in search.wanted(done)],
            workers=arguments.workers,
            expected=per_arm * len(mine),
        )
        done = gather(sweep.read, searches.values())
    except OSError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    except (SweepError, ValueError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    found = [row for arm, search in searches.items() if (row := Row.of(arm, search, done, searches)) is not None]
    shown = table(found, setting)
    stem = arguments.out / f"study-{arguments.targets}"
    write_atomically(stem.with_suffix(".md"), shown + "\n")
    write_atomically(stem.with_suffix(".json"), json.dumps([row.as_json() for row in found], indent=1) + "\n")
    print(shown)
    missing = [arm for arm in searches if arm not in {row.arm for row in found}]
    if missing:
        print(f"not complete yet (other shards?) or diverged: {', '.join(missing)}", file=sys.stderr)
    print(f"\n{stem}.md, {stem}.json; one folder per run in {arguments.out / 'cells'}")
    return 1 if set(missing) & set(mine) else 0


def make_plan(arguments: argparse.Namespace) -> dict[str, RateSearch[StudyCell]]:
    """Arm -> its search.

    Raises:
        ValueError: a setting that cannot be.
    """
    for option in ("seeds", "search_seeds"):
        if getattr(arguments, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')}={getattr(arguments, option)}: at least 1 is needed")
    setting = Setting(
        arguments.model,
        arguments.corpus,
        arguments.targets,
        arguments.epochs,
        arguments.train,
        arguments.held_out,
        arguments.length,
        arguments.batch,
    )
    seeds = tuple(range(arguments.seed, arguments.seed + arguments.seeds))
    arms = arguments.arms or list(ARMS)
    if arguments.smoke:
        arms, seeds = arguments.arms or ["lora", "cola-2"], seeds[:2]
        setting = Setting(setting.model, setting.corpus, setting.targets, 2, 4, 2, 16, 2)
    return {
        arm: RateSearch(
            cell=lambda lr, seed, arm=arm: StudyCell(setting, ARMS[arm].method, lr, seed),  # type: ignore[misc]
            rates=ARMS[arm].rates if not arguments.smoke else (ARMS[arm].start,),
            start=(ARMS[arm].start,),
            search_seeds=seeds[: arguments.search_seeds],
            seeds=seeds,
            loss=lambda outcome: outcome.get("dev", math.inf),
            final=lambda cell: (cell.tested,),
        )
        for arm in arms
    }


@dataclass(frozen=True)
class Row:
    """One arm's line of the table; losses in nats per token.

    Attributes:
        arm: its name.
        reference: the arm it is compared with; None for a reference itself.
        lr: chosen.
        tests: test loss per seed.
        dev_by_epoch: mean over seeds.
        train_loss: mean over the last epoch and the seeds.
        against: paired difference from the reference, and p of its paired t test.
        knots: mean number inside the run.
        parameters: trainable at once, at most.
    """

    arm: str
    reference: str | None
    lr: float
    tests: tuple[float, ...]
    dev_by_epoch: tuple[float, ...]
    train_loss: float
    against: stats.Paired | None
    knots: float
    parameters: int

    @classmethod
    def of(
        cls,
        arm: str,
        search: RateSearch[StudyCell],
        done: Mapping[StudyCell, Outcome],
        searches: Mapping[str, RateSearch[StudyCell]],
    ) -> Row | None:
        """From the outcomes; None where some are missing or a chosen run diverged."""
        tests = _tests(search, done)
        if tests is None:
            return None
        runs = search.results(done)
        reference = REFERENCES.get(arm, "lora")
        other = _tests(searches[reference], done) if reference in searches and reference != arm else None
        steps = [done[cell]["losses"] for cell in runs]
        last = [losses[-max(1, len(losses) // runs[0].setting.epochs) :] for losses in steps]
        return cls(
            arm,
            None if other is None else reference,
            runs[0].lr,
            tuple(tests),
            tuple(_mean(column) for column in zip(*(done[cell]["dev_by_epoch"] for cell in runs))),
            _mean([_mean(losses) for losses in last]),
            None if other is None else stats.paired({arm: tests, reference: other}, reference)[arm],
            _mean([len(done[cell]["knots"]) for cell in runs]),
            done[runs[0]]["parameters"],
        )

    def as_json(self) -> dict[str, Any]:
        """For a file; what is not a number is null."""
        against = None
        if self.against is not None:
            values = (self.against.difference.mean, self.against.difference.low, self.against.difference.high)
            mean, low, high, p = (value if math.isfinite(value) else None for value in (*values, self.against.p))
            against = {"reference": self.reference, "mean": mean, "low": low, "high": high, "p": p}
        return {**vars(self), "against": against}


def table(rows: Sequence[Row], setting: Setting) -> str:
    """The rows in Markdown; p is Holm's over all comparisons of the table."""
    unit = setting.per_nat
    adjusted = dict(
        zip(
            [row.arm for row in rows if row.against is not None],
            stats.holm([row.against.p for row in rows if row.against is not None]),
        )
    )
    lines = [
        f"| arm | rate | test, {setting.unit} | minus its reference (95 % CI) | p (Holm) | dev, first → last epoch "
        "| train | knots | trained |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        interval = stats.t_interval([loss * unit for loss in row.tests])
        deviation = stats.deviation([loss * unit for loss in row.tests])
        difference = p = ""
        if row.against is not None:
            change = row.against.difference
            difference = f"{change.mean * unit:+.4f} ({change.low * unit:+.4f} to {change.high * unit:+.4f})"
            difference += "" if row.reference == "lora" else f" from {ARMS[row.reference or ''].label}"
            p = f"{adjusted[row.arm]:.2g}"
        dev = f"{row.dev_by_epoch[0] * unit:.4f} → {row.dev_by_epoch[-1] * unit:.4f}"
        lines.append(
            f"| {ARMS[row.arm].label} | {row.lr:g} | {interval.mean:.4f} ± {deviation:.4f} | {difference} | {p} "
            f"| {dev} | {row.train_loss * unit:.4f} | {row.knots:.3g} | {row.parameters:,} |"
        )
    return "\n".join(lines)


def _tests(search: RateSearch[StudyCell], done: Mapping[StudyCell, Outcome]) -> list[float] | None:
    if search.chosen(done) is None:
        return None
    outcomes = [done.get(cell.tested, {}) for cell in search.results(done)]
    return [outcome["test"] for outcome in outcomes] if all("test" in outcome for outcome in outcomes) else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
