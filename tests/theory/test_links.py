"""The command ``python -m theory.links``: its table, its files and its messages."""

import json
import math

import pytest
import torch

from theory import links
from theory.real_run.kinds import kinds
from theory.real_run.side_by_side import Budget, run_links

SMALL = ["--steps", "2", "--links", "1", "--seeds", "2", "--rank", "2"]


def test_command_on_a_random_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(links, "kinds", lambda rank: [kinds(rank)[i] for i in (0, 2, 7)])  # one of each class
    assert links.main(["--model", "random", *SMALL, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "95% intervals over 2 seeds" in out
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for line, kind in zip(out.splitlines()[2:5], dict.fromkeys(row["kind"] for row in rows), strict=True):
        assert line.startswith(kind)
    for row in rows:
        assert len(row["loss"]) == 2
        assert row["drop"] == pytest.approx([p - c for p, c in zip(row["promised"], row["curvature"])])
        assert sum(row["terms"].values()) > 0


def test_kinds_in_processes_of_their_own_give_the_same_results(tmp_path, capsys):
    """One thread each, so that not even digits differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for workers in "12":
            out = tmp_path / workers
            assert links.main(["--model", "random", *SMALL, "--workers", workers, "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "1" / "results.jsonl").read_text() == (tmp_path / "2" / "results.jsonl").read_text()


def test_links_of_a_tiny_language_model(tmp_path):
    """A model of `experiments`, made here; its layers are those that "all-linear" adapts."""
    pytest.importorskip("transformers")
    from experiments.tiny import tiny_opt

    tiny_opt.save(tiny_opt.fresh(tiny_opt.config(16, 1, 2, 128), 0), tmp_path / "model", {})
    task = links.language_model(str(tmp_path / "model"))
    assert len(task.layers) == 6
    assert not any("lm_head" in path for path in task.layers)
    first, second = (next(task.batches(0)) for _ in range(2))
    assert first.equal(second)
    assert max(task.ranks) == 16
    chosen = links.language_model(str(tmp_path / "model"), ["q_proj", "v_proj"]).layers
    assert len(chosen) == 2
    assert all(path.endswith(("q_proj", "v_proj")) for path in chosen)
    task.fixed = task.fixed[:1]
    for kind in kinds(rank=1)[:3]:
        found = run_links(task, kind, kind.start, Budget(links=1, steps=2), 0)
        assert 0 < found.alignment[0] < 1
        assert math.isfinite(found.loss[-1])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--links", "0"], "--links must be a whole number of at least 1, got 0"),
        (["--steps", "1"], "--steps must be a whole number of at least 2, got 1"),
        (["--seeds", "0"], "--seeds must be a whole number of at least 1, got 0"),
        (["--rank", "0"], "--rank must be a whole number of at least 1, got 0"),
        (["--seed", "-1"], "--seed must be a whole number of at least 0, got -1"),
        (["--workers", "0"], "--workers must be a whole number of at least 1, got 0"),
        (["--model", "random", "--rank", "13"], "--rank must be at most 12, the rank of a layer, got 13"),
        (["--model", "random", "--targets", "q_proj"], "--targets names layers of a language model"),
    ],
)
def test_command_names_bad_options(options, message, tmp_path, capsys):
    assert links.main([*options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_decomposition_that_is_off_fails(tmp_path, capsys, monkeypatch):
    from theory.real_run.decomposition import Decomposition

    monkeypatch.setattr(Decomposition, "identity_error", lambda self: 0.1)
    monkeypatch.setattr(links, "kinds", lambda rank: kinds(rank)[:1])
    assert links.main(["--model", "random", *SMALL, "--out", str(tmp_path)]) == 1
    assert "FAIL AdamW (seed 0): the decomposition is off" in capsys.readouterr().out


def test_help_names_each_default_once(capsys):
    with pytest.raises(SystemExit) as stopped:
        links.main(["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: runs/links)" in shown
    assert "default: None" not in shown


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert links.main(["--model", "random", "--out", str(tmp_path / "file" / "below")]) == 2
    said = capsys.readouterr()
    assert "--out must be a folder to write" in said.err
    assert not said.out
