"""The paper's numbers as data: complete, consistent with each other, and absent where the paper has none."""

import doctest

import pytest

from experiments.paper import published as paper
from experiments.paper.published import protocol, published

TASKS = {"sst2", "wsc", "cb", "wic", "boolq", "multirc", "rte", "drop", "squad", "copa", "record"}

#: table -> (rows, tasks, sum of all its scores): a mistyped digit changes the sum
SIZES = {
    1: (3, 11, 2298.31),
    2: (5, 5, 1902.81),
    3: (3, 6, 1312.82),
    4: (5, 3, 987.24),
    5: (4, 5, 1393.83),
    6: (4, 11, 2876.81),
    7: (2, 3, 481.84),
    8: (6, 5, 2232.96),
}


@pytest.mark.parametrize("number", range(1, 9))
def test_every_table_is_whole(number):
    table = published(number)
    rows, tasks, total = SIZES[number]
    assert (len(table.rows), len(table.columns)) == (rows, tasks)
    assert set(table.columns) <= TASKS
    scores = [score for row in table.rows.values() for score in row.values()]
    assert len(scores) == rows * tasks
    assert all(0 < score.mean < 100 for score in scores)
    assert sum(score.mean for score in scores) == pytest.approx(total, abs=1e-9)


def test_the_tables_share_their_runs():
    """Table 1's COLA is the chain of three links, Table 4's COLA(8,8) the chain of two; LoRA is always the same."""
    for task in ("wsc", "multirc", "cb", "copa", "rte"):
        assert published(1).score("COLA", task).mean == published(3).score("length 3", task).mean
    assert published(1).score("COLA", "squad").mean == 83.56 != published(3).score("length 3", "squad").mean == 83.55
    for task in ("wsc", "cb"):
        assert published(4).score("COLA(8,8)", task).mean == published(3).score("length 2", task).mean
    for number, row in ((3, "length 1"), (4, "LoRA")):
        for task in published(number).columns:
            assert published(number).score(row, task).mean == published(1).score("LoRA", task).mean


def test_what_the_paper_does_not_print_is_none():
    assert published(1).score("LoRA", "sst2").std is None
    assert published(3).score("length 1", "wsc").std == 7.67
    assert published(4).score("COLA(8,8)", "cb").flops_saved is None
    assert published(4).score("COLA(8,6)", "cb").flops_saved == 3.6e11
    assert published(7).score("LoRA", "drop") is None
    assert published(7).score("full", "wic") is None
    with pytest.raises(KeyError, match="number=9"):
        published(9)


def test_the_protocol_and_its_grids():
    how = protocol()
    assert (how.train, how.dev, how.test, how.epochs, how.seeds) == (1000, 500, 1000, 5, 5)
    assert how.batch == {"OPT-1.3B": 8, "Llama-2-7B": 4}
    assert how.adapter_bias == {"OPT-1.3B": True, "Llama-2-7B": False}
    assert how.grid(adapters=True) == how.grid(adapters=True, optimizer="AdaGrad") == (5e-5, 1e-4, 5e-4, 8e-4, 1e-3)
    assert how.grid(adapters=True, optimizer="SGD") == (2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
    assert len(how.grid(adapters=False)) == 6
    assert len(how.grid(adapters=False, model="Llama-2-7B")) == 9
    for rates in how.rates.values():
        assert list(rates) == sorted(set(rates))
    with pytest.raises(KeyError, match="adapters, Lion"):
        how.grid(adapters=True, optimizer="Lion")


def test_nobody_can_change_them():
    with pytest.raises(TypeError):
        published(1).rows["LoRA"]["sst2"] = None
    with pytest.raises(TypeError):
        protocol().rates["x"] = ()


def test_the_docstrings():
    assert doctest.testmod(paper).failed == 0
