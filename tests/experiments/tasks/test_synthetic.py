"""Made-up data: what every task can read, the same every time, and marked."""

import hashlib

import pytest

from experiments.tasks import synthetic


def test_every_task_reads_its_rows(tmp_path):
    tasks = pytest.importorskip("experiments.tasks")
    loading = pytest.importorskip("experiments.tasks.loading")
    synthetic.write(tmp_path, synthetic.ROWS, 24, 12)
    assert {tasks.key(name) for name in tasks.TASKS} == set(synthetic.ROWS)
    for name in synthetic.ROWS:
        task = tasks.task(name)
        drawn = loading.split(task, 0, train=16, dev=8, test=12, data_dir=tmp_path)
        assert (len(drawn.train), len(drawn.dev), len(drawn.test)) == (16, 8, 12)
        for sample in drawn.test:
            assert task.full(sample, sample.target).startswith(task.prompt(sample).rstrip(" "))
        if task.kind == "classification":
            assert {sample.gold[0] for sample in drawn.train} == set(range(len(drawn.train[0].candidates)))
    assert "mean nothing" in (tmp_path / synthetic.NOTICE).read_text()


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    def digest(folder):
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.jsonl"))}

    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthetic.write(tmp_path / folder, ["drop"], 5, 5, seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda folder: synthetic.write(folder, ["mnli"], 1, 1), "task='mnli'"),
        (lambda folder: synthetic.write(folder, ["cb"], 0, 1), "train=0"),
    ],
)
def test_bad_input_is_named(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
