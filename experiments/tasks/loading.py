"""Rows from the hub or from JSONL files, and the samples that a seed draws from them.

The draw is the protocol's. A task has two pools, the hub's `train` and `validation` splits (the labels of the test
splits are not published). With `permutation` from `np.random.seed(seed)`, training and dev set are the first
`train + dev` rows of the permuted training pool, the last `dev` of them are the dev set. The test set is the first
`test` rows of the permuted validation pool. The seed thus chooses the data, and a pool that is too small is used whole.

A folder of files replaces the hub: `<dir>/<task>/train.jsonl` and `validation.jsonl` are the two pools. With
`test.jsonl` too, the three files are the pools of the three sets, each permuted by the seed and cut.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from experiments import hub
from experiments.tasks import Sample, Task, key

logger = logging.getLogger(__name__)

_PARQUET = "refs/convert/parquet"


@dataclass(frozen=True)
class Splits:
    """The samples of one seed. `dev` selects the checkpoint; `test` is scored once."""

    train: tuple[Sample, ...]
    dev: tuple[Sample, ...]
    test: tuple[Sample, ...]


def split(
    task: Task,
    seed: int,
    train: int = 1000,
    dev: int | None = None,
    test: int = 1000,
    data_dir: str | Path | None = None,
) -> Splits:
    """Draw the training, dev and test samples of `task`.

    Args:
        task: one of `TASKS`.
        seed: of the draw, as `np.random.seed` takes it; numpy's global generator is left alone.
        train: training samples. The paper's tables use 1000, Table 6 100 and 50, Table 7 5000.
        dev: dev samples; None is the protocol's `task.dev`. With 0 there are none; the protocol draws
            demonstrations so.
        test: test samples.
        data_dir: a folder of files, or None for the hub.

    Raises:
        FileNotFoundError: `data_dir` has no folder for the task, or the folder lacks a file.
        ValueError: a size is negative, a row is not the task's, or nothing is left to train on.
        OSError: the hub cannot be reached.
    """
    dev = task.dev if dev is None else dev
    for name, size in (("train", train), ("dev", dev), ("test", test)):
        if size < 0:
            raise ValueError(f"{name}={size} must be 0 or more")
    pools: dict[str, Sequence[Sample]] = _hub(task) if data_dir is None else _folder(task, Path(data_dir))
    if "test" in pools:
        drawn_train, drawn_dev = draw(pools["train"], seed, train), draw(pools["validation"], seed, dev)
        drawn_test = draw(pools["test"], seed, test)
    else:
        both = draw(pools["train"], seed, train + dev)
        cut = max(0, len(both) - dev)
        drawn_train, drawn_dev = both[:cut], both[cut:]
        drawn_test = draw(pools["validation"], seed, test)
    if train and not drawn_train:
        raise ValueError(
            f"dev={dev} leaves no sample to train on: {task.name} has {len(pools['train'])} in all; lower dev"
        )
    got = {"train": len(drawn_train), "dev": len(drawn_dev), "test": len(drawn_test)}
    if got != {"train": train, "dev": dev, "test": test}:
        logger.warning("%s: asked for train=%d, dev=%d, test=%d, got %s", task.name, train, dev, test, got)
    return Splits(drawn_train, drawn_dev, drawn_test)


def draw(pool: Sequence[Sample], seed: int, count: int) -> tuple[Sample, ...]:
    """The first `count` of `pool` permuted as by `np.random.seed(seed)`, or all if there are fewer."""
    order = np.random.RandomState(seed).permutation(len(pool))[:count]
    return tuple(pool[int(index)] for index in order)


def read(task: Task, path: Path) -> list[Sample]:
    """The samples in a JSONL file, one a line, UTF-8; empty lines are skipped.

    Raises:
        ValueError: a line is not a JSON object or not a row of the task; the message names file and line.
    """
    samples = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object with the fields {sorted(task.required)}, got {row!r:.60}")
                samples.append(task.sample(row))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not samples:
        raise ValueError(f"{path} holds no rows")
    return samples


def _folder(task: Task, data_dir: Path) -> dict[str, Sequence[Sample]]:
    wanted = f"{data_dir}/{key(task.name)}/train.jsonl, validation.jsonl and, if you like, test.jsonl"
    if not data_dir.is_dir():
        raise FileNotFoundError(f"data_dir={str(data_dir)!r} is not a folder; expected {wanted}")
    folders = [path for path in sorted(data_dir.iterdir()) if path.is_dir() and key(path.name) == key(task.name)]
    if not folders:
        raise FileNotFoundError(f"data_dir={str(data_dir)!r} has no folder for {task.name}; expected {wanted}")
    pools: dict[str, Sequence[Sample]] = {}
    for name in ("train", "validation", "test"):
        path = folders[0] / f"{name}.jsonl"
        if path.is_file():
            pools[name] = read(task, path)
        elif name != "test":
            raise FileNotFoundError(f"data_dir={str(data_dir)!r}: {path} is missing; expected {wanted}")
    return pools


def _hub(task: Task) -> dict[str, Sequence[Sample]]:
    from datasets import disable_progress_bars, load_dataset

    path, config = task.hub
    disable_progress_bars()
    hub.prefer_cache(path)
    try:
        try:
            splits = load_dataset(path, config)
        except RuntimeError as error:
            # `datasets` 4 and later do not run the loading scripts of older data sets
            if "script" not in str(error):
                raise
            splits = load_dataset(path, config, revision=_PARQUET)
    except Exception as error:
        name = path if config is None else f"{path} ({config})"
        raise OSError(
            f"{task.name}: {name} could not be loaded from the hub ({type(error).__name__}: {error}); pass --data-dir "
            f"with {key(task.name)}/train.jsonl and validation.jsonl, or fill the cache while there is a network"
        ) from error
    return {name: _HubSamples(task, splits[name]) for name in ("train", "validation")}


class _HubSamples(Sequence[Sample]):
    """The samples of a split of the hub, made on demand because most rows are never drawn."""

    def __init__(self, task: Task, rows: Any) -> None:
        self.task, self.rows = task, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        try:
            return self.task.sample(self.rows[index])
        except ValueError as error:
            raise ValueError(f"{'/'.join(filter(None, self.task.hub))}, row {index}: {error}") from error
