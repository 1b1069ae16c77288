"""The measurement behind rounding="auto" tells the roundings apart, on a tiny model made here."""

import json

import pytest

pytest.importorskip("transformers")

from experiments.__main__ import main
from experiments.study import rounding
from experiments.tiny import tiny_opt


@pytest.fixture
def folder(tmp_path):
    model = tiny_opt.fresh(tiny_opt.config(width=16, layers=1, heads=1, context=tiny_opt.CONTEXT), seed=0)
    tiny_opt.save(model, tmp_path / "model", {})
    return tmp_path / "model"


def test_it_runs_and_the_numbers_are_in_the_order_that_arithmetic_demands(folder, tmp_path, capsys):
    options = "--dtypes bfloat16 --links 4 --lr 1e-4 --seeds 1 --steps 4"
    status = main(["rounding", "--model", str(folder), "--out", str(tmp_path / "out"), *options.split()])
    assert status == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "rounding.jsonl").read_text().splitlines()]
    assert len(lines) == len(rounding.ROUNDINGS)
    error = {name: [line["error"] for line in lines if line["rounding"] == name] for name in rounding.ROUNDINGS}
    # one rounding of each weight at the end against one at each of four knots; at random is twice as coarse
    assert max(error["exact (fp32)"]) < 1e-2 < max(error["compensated"])
    assert max(error["compensated"]) < min(error["stochastic"])
    table = capsys.readouterr().out
    assert "| bfloat16 | 4 | 0.0001 |" in table
    assert "itself" in table
