"""Pools, draws and what is said about bad files."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from experiments.tasks import TASKS
from experiments.tasks.loading import draw, split

RTE = TASKS["RTE"]


def row(number, label=0):
    return {"premise": f"premise {number}", "hypothesis": "h", "label": label}


def write(folder, **pools):
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in pools.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in numbers))


def numbers(samples):
    return [int(sample.fields["premise"].split()[1]) for sample in samples]


def permuted(seed, count):
    """What the protocol does, with the generator that everyone shares; it is put back."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    order = np.random.permutation(count).tolist()  # noqa: NPY002
    np.random.set_state(state)  # noqa: NPY002
    return order


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1])
def test_two_files_are_drawn_as_the_hubs_splits(tmp_path, seed):
    write(tmp_path / "RTE", train=range(40), validation=range(100, 130))
    state = np.random.get_state()  # noqa: NPY002
    drawn = split(RTE, seed, train=10, dev=5, test=7, data_dir=tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(state, np.random.get_state()))  # noqa: NPY002
    order = permuted(seed, 40)
    assert numbers(drawn.train) == order[:10]
    assert numbers(drawn.dev) == order[10:15]
    assert numbers(drawn.test) == [100 + index for index in permuted(seed, 30)[:7]]


def test_a_small_pool_is_used_whole_and_the_last_are_the_dev_set(tmp_path, caplog):
    write(tmp_path / "rte", train=range(12), validation=range(5))
    drawn = split(RTE, 3, train=10, dev=8, test=1000, data_dir=str(tmp_path))
    order = permuted(3, 12)
    assert (numbers(drawn.train), numbers(drawn.dev)) == (order[:4], order[4:])
    assert numbers(drawn.test) == permuted(3, 5)
    assert "got {'train': 4, 'dev': 8, 'test': 5}" in caplog.text


def test_three_files_are_three_pools(tmp_path):
    write(tmp_path / "R-T-E", train=range(20), validation=range(100, 120), test=range(200, 220))
    drawn = split(RTE, 1, train=6, dev=4, test=3, data_dir=tmp_path)
    order = permuted(1, 20)
    assert numbers(drawn.train) == order[:6]
    assert numbers(drawn.dev) == [100 + index for index in order[:4]]
    assert numbers(drawn.test) == [200 + index for index in order[:3]]


def test_the_dev_set_is_the_protocols_unless_told(tmp_path):
    write(tmp_path / "cb", train=range(250), validation=range(56))
    drawn = split(TASKS["CB"], 0, data_dir=tmp_path)
    assert [len(part) for part in (drawn.train, drawn.dev, drawn.test)] == [150, 100, 56]
    low = split(TASKS["CB"], 0, train=50, dev=0, test=50, data_dir=tmp_path)
    assert [len(part) for part in (low.train, low.dev, low.test)] == [50, 0, 50]
    assert low.train == drawn.train[:50]


def test_more_samples_of_one_seed_extend_fewer():
    pool = [RTE.sample(row(number)) for number in range(30)]
    assert draw(pool, 5, 20)[:8] == draw(pool, 5, 8)


def test_rows_through_datasets(tmp_path, monkeypatch):
    """The hub's path with the real library, which reads a folder as it reads a repository."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "data", train=range(15), validation=range(50, 58))
    drawn = split(replace(RTE, hub=(str(tmp_path / "data"), None)), 2, train=4, dev=3, test=2)
    order = permuted(2, 15)
    assert (numbers(drawn.train), numbers(drawn.dev)) == (order[:4], order[4:7])
    assert numbers(drawn.test) == [50 + index for index in permuted(2, 8)[:2]]


def test_a_row_of_the_hub_that_is_not_the_tasks_is_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "data", train=[0], validation=[1])
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(row(0, label=-1)))
    with pytest.raises(ValueError, match=r"data, row 0: RTE: label=-1"):
        split(replace(RTE, hub=(str(tmp_path / "data"), None)), 0, dev=0)


def test_an_unreachable_hub_says_what_to_do():
    pytest.importorskip("datasets")
    with pytest.raises(
        OSError, match=r"RTE: no-one/nothing \(rte\) could not be loaded .* pass --data-dir with rte/train"
    ):
        split(replace(RTE, hub=("no-one/nothing", "rte")), 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"premise": "a", "hypothesis": "b", "label": 0}\n\n{"premise": 1}\n', r"train.jsonl, line 3: RTE: premise=1"),
        ("{]\n", r"train.jsonl, line 1: Expecting"),
        ("[1, 2]\n", r"train.jsonl, line 1: expected an object with the fields \['hypothesis', .*got \[1, 2\]"),
        ("\n", r"train.jsonl holds no rows"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, message):
    write(tmp_path / "rte", validation=[1])
    (tmp_path / "rte" / "train.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        split(RTE, 0, data_dir=tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a folder; expected .*rte/train.jsonl, validation.jsonl"):
        split(RTE, 0, data_dir=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no folder for RTE"):
        split(RTE, 0, data_dir=tmp_path)
    write(tmp_path / "rte", train=[1])
    with pytest.raises(FileNotFoundError, match=r"validation.jsonl is missing"):
        split(RTE, 0, data_dir=tmp_path)


def test_sizes_that_make_no_sense_are_refused(tmp_path):
    write(tmp_path / "rte", train=range(5), validation=range(5))
    with pytest.raises(ValueError, match="test=-1 must be 0 or more"):
        split(RTE, 0, test=-1, data_dir=tmp_path)
    with pytest.raises(ValueError, match="dev=500 leaves no sample to train on: RTE has 5 in all; lower dev"):
        split(RTE, 0, data_dir=tmp_path)


def test_tasks_import_neither_datasets_nor_torch():
    code = """
import sys
import experiments.tasks.loading
assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
