"""The command ``python -m theory.llm_gap``: its files, its exit codes and its messages."""

import json

import numpy as np
import pytest

from theory import llm_gap


def test_command_on_a_random_network(tmp_path, capsys):
    assert llm_gap.main(["--model", "random", "--epochs", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "average gap" in out
    assert "oracle error" in out
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["link"] * 3 + ["chain"]
    assert sum(rows[-1]["terms"].values()) == pytest.approx(np.mean(rows[-1]["low"]))
    assert (tmp_path / "chain_gap.png").read_bytes().startswith(b"\x89PNG")


def test_command_fails_where_the_decomposition_does(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(llm_gap.Decomposition, "identity_error", lambda self: 0.1)
    assert llm_gap.main(["--model", "random", "--epochs", "1", "--out", str(tmp_path)]) == 1
    assert "FAIL the decomposition is off by 0.1" in capsys.readouterr().out


def test_the_folder_is_made_before_the_training(tmp_path, capsys, monkeypatch):
    def train(options):
        raise ValueError(f"{options.out} is there: {options.out.is_dir()}")

    monkeypatch.setattr(llm_gap.chains, "train", train)
    assert llm_gap.main(["--out", str(tmp_path / "new" / "folder")]) == 2
    assert "folder is there: True" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "random", "--epochs", "0"], "--epochs must be a whole number of at least 1, got 0"),
        (["--model", "random", "--epochs", "1", "--delta", "0.01"], "delta must be at least"),
        (["--lr", "-1"], "--lr must be a finite number above 0, got -1.0"),
        (["--delta", "-1"], "--delta must be a finite number above 0, got -1.0"),
        (["--eta", "0"], "--eta must be a finite number above 0, got 0.0"),
        (["--seed", "-1"], "--seed must be a whole number of at least 0, got -1"),
        (["--model", "random", "--arm", "cola-3"], "--arm names an arm of the demo: leave it out with --model random"),
        (["--arm", "full"], "--arm 'full' is not a chain: choose from lora"),
    ],
)
def test_command_names_bad_options(options, message, tmp_path, capsys):
    assert llm_gap.main([*options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_command_on_the_demos_chain(tmp_path, capsys):
    pytest.importorskip("transformers")
    assert llm_gap.main(["--epochs", "1", "--out", str(tmp_path)]) == 0
    chain = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert len(chain["low"]) == 3
    assert all(low >= 0 for low in chain["low"])
    assert chain["loss"][-1] < chain["loss"][0]
