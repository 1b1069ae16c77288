"""Outcomes in TensorBoard's files, read back by TensorBoard."""

import math
from dataclasses import dataclass

import pytest

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.sweep import Sweep
from experiments.sweep.tensorboard import Board


@dataclass(frozen=True)
class Toy:
    seed: int


def test_numbers_and_curves_are_written_once(tmp_path):
    sweep = Sweep(tmp_path / "sweep", lambda cell, folder: {})
    board = Board(sweep, tmp_path / "board")
    outcome = {"dev": 71.5, "losses": [2.0, math.nan, 1.0], "diverged": "no", "ok": True, "knots": [{"step": 3}]}
    for _ in range(2):  # a sweep that is resumed reports what it finds
        board(Toy(1), outcome)
    board(Toy(2), {"dev": 70})
    places = sorted((tmp_path / "board").iterdir())
    assert {place.name for place in places} == {sweep.place(Toy(seed)).name for seed in (1, 2)}
    (first,) = (place for place in places if place.name == sweep.place(Toy(1)).name)
    assert len(list(first.iterdir())) == 1
    read = EventAccumulator(str(first)).Reload()
    assert set(read.Tags()["scalars"]) == {"dev", "losses"}
    assert [(event.step, event.value) for event in read.Scalars("dev")] == [(1, 71.5)]
    assert [(event.step, event.value) for event in read.Scalars("losses")] == [(1, 2.0), (3, 1.0)]
