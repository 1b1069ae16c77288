"""`table` and `figure` as typed, on the tiny model and made-up data of --smoke: real runs, each kept and reused."""

import gc
import json

import pytest
import torch
import transformers

pytest.importorskip("matplotlib")

from experiments.__main__ import main
from experiments.paper import reproduce as table
from experiments.paper import tables
from experiments.paper.own_tables import OWN_TABLES
from experiments.paper.published import published
from experiments.paper.tables import FIGURES, TABLES
from experiments.tasks import synthetic


@pytest.fixture(scope="module", autouse=True)
def process():
    """Runs in this process flush denormal numbers, which other tests must not see, and collect garbage every time."""
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all commands, as a user has: runs that tables share are run once."""
    return tmp_path_factory.mktemp("paper")


def typed(line, folder):
    return main([*line.split(), "--smoke", "--workers", "1", "--out", str(folder)])


def outcomes(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/outcome.json")}


@pytest.mark.parametrize("number", list(TABLES))
def test_every_table_on_one_task(number, folder, capsys):
    """One seed and one rate; whole smoke runs are long tests."""
    task = "wsc" if "wsc" in TABLES[number].tasks else TABLES[number].tasks[0]
    assert typed(f"table {number} --tasks {task} --rates 1 --seeds 1", folder) == 0
    shown = capsys.readouterr().out
    assert "Made-up data: these scores mean nothing." in shown
    assert "Not complete" not in shown
    written = json.loads((folder / f"table{number}.json").read_text())
    assert written["missing"] == []
    assert written["command"] == (
        f"python -m experiments table {number} --out {folder} --seeds 1 --smoke --tasks {task} --rates 1"
    )
    scores = [cell for cell in written["cells"] if cell["column"] == task]
    assert [cell["row"] for cell in scores] == list(published(number).rows)
    assert all(0 <= cell["mean"] <= 100 and cell["n"] == 1 for cell in scores)
    assert all(cell["paper"] == published(number).score(cell["row"], task).mean for cell in scores)
    for suffix in ("txt", "md", "csv", "tex"):
        assert (folder / f"table{number}.{suffix}").stat().st_size > 100
    if number == 4:
        saved = {cell["row"]: cell["mean"] for cell in written["cells"] if cell["column"] == f"{task}:flops"}
        assert saved["COLA(8,6)"] > 0
        assert saved["COLA(8,4)"] == 2 * saved["COLA(8,6)"]
        assert saved["COLA(8,2)"] == 3 * saved["COLA(8,6)"]


@pytest.mark.parametrize("table", list(OWN_TABLES.values()), ids=OWN_TABLES)
def test_tables_of_our_own_on_one_task(table, folder, capsys):
    assert typed(f"table {table.name} --tasks cb --rates 1 --seeds 1", folder) == 0
    assert table.title in capsys.readouterr().out
    written = json.loads((folder / f"table-{table.name}.json").read_text())
    assert written["missing"] == []
    assert [entry["row"] for entry in written["cells"]] == [line.label for line in table.lines]


@pytest.mark.parametrize("number", list(FIGURES))
def test_figures_run_nothing_that_their_table_has_run(number, folder):
    options = "--tasks wsc --rates 1 --seeds 1"
    assert typed(f"table {FIGURES[number]} {options}", folder) == 0
    before = outcomes(folder)
    assert typed(f"figure {number} {options}", folder) == 0
    assert outcomes(folder) == before
    assert (folder / f"figure{number}.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / f"figure{number}.pdf").read_bytes().startswith(b"%PDF")
    points = json.loads((folder / f"figure{number}.json").read_text())
    assert points["missing"] == []
    assert len(points["panels"]["wsc"]) == len(TABLES[FIGURES[number]].lines)


def test_a_search_two_seeds_a_part_first_and_tensorboard(tmp_path, capsys):
    """Runs of a part of a table are those of the table."""
    pytest.importorskip("tensorboard")
    options = "table 7 --tasks wic --tensorboard"
    assert typed(f"{options} --lines LoRA", tmp_path) == 0
    half = outcomes(tmp_path)
    assert typed(options, tmp_path) == 0
    assert "Not complete" not in capsys.readouterr().out
    both = outcomes(tmp_path)
    # two rates on the first seed, the best on the second, for either line
    assert len(half) == 3
    assert len(both) == 6
    assert {path: both[path] for path in half} == half
    assert len(list((tmp_path / "tensorboard").iterdir())) == 6
    written = json.loads((tmp_path / "table7.json").read_text())
    assert [cell["n"] for cell in written["cells"]] == [2, 2]
    assert typed(options, tmp_path) == 0
    assert outcomes(tmp_path) == both


def test_a_run_that_diverges_fails_the_command(tmp_path, capsys):
    options = "table 7 --tasks wic --lines LoRA --rates 1 --seeds 1"
    assert typed(options, tmp_path) == 0
    (path,) = outcomes(tmp_path)
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "outcome": {"diverged": "the loss is nan after 3 steps"}}))
    assert typed(options, tmp_path) == 1
    shown = capsys.readouterr()
    assert "FAIL LoRA, wic: no score for seed 0" in shown.err
    assert "LoRA, WIC: seed 0 diverged" in shown.out
    written = json.loads((tmp_path / "table7.json").read_text())
    assert [cell["mean"] for cell in written["cells"]] == [None]


def test_ones_own_data_and_model(tmp_path, capsys):
    synthetic.write(tmp_path / "data", ["wic"], 20, 8)
    (tmp_path / "data" / synthetic.NOTICE).unlink()
    options = f"table 7 --tasks wic --lines LoRA --rates 1 --seeds 1 --data-dir {tmp_path / 'data'}"
    assert typed(options, tmp_path / "out") == 0
    assert "Made-up" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "smoke-data").exists()


def test_flops_that_cannot_be_counted_are_missing_and_the_scores_are_not(tmp_path, capsys):
    model = tmp_path / "model"
    transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=300).save_pretrained(model)
    setting = tables.Setting(model=str(model))
    assert table._flops_per_token(TABLES[4], setting) is None
    said = capsys.readouterr().err
    assert "FLOPs saved will be missing: targets=('q_proj', 'v_proj')" in said
    assert "'gpt2'" in said
    assert table._flops_per_token(TABLES[1], setting) is None
    assert table._flops_per_token(TABLES[4], tables.Setting(model=str(model), targets=("c_attn",))) == 4 * 8 + 6 * 24
    assert table._flops_per_token(TABLES[4], tables.Setting(model="tiny")) > 0


@pytest.mark.parametrize(
    "line, message",
    [
        ("table 7 --tasks drop", "Table 7 has wic, sst2, boolq"),
        ("table 7 --lines Finetune", "Table 7 has LoRA; COLA"),
        ("table 7 --seeds 0", "argument --seeds: 0: give a whole number"),
        ("table 7 --workers 0", "argument --workers: 0"),
        ("table 7 --cpus 2", "--cpus: that is a run's share of a node; give --cluster too"),
        ("table 7 --gpus 1.5 --cluster auto", "argument --gpus: 1.5: give a fraction of a GPU"),
        ("table 7 --data-dir /nonexistent --seeds 1 --rates 1", "/nonexistent"),
        ("table 7 --model ./none", "model='./none': there is no such folder"),
        ("figure 2 --rates 0", "argument --rates: 0"),
    ],
)
def test_bad_arguments_are_named(line, message, tmp_path, capsys):
    assert (
        main([*line.split(), "--smoke", *([] if "--workers" in line else ["--workers", "1"]), "--out", str(tmp_path)])
        == 2
    )
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("line", ["table 9", "figure 1", "table", "table one"])
def test_there_are_eight_tables_and_two_figures(line, capsys):
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert "number" in said or "argument TABLE" in said or "required: TABLE" in said


@pytest.mark.long
@pytest.mark.parametrize("line", ["table 1 --rates 1 --seeds 1", "table 2"], ids=["all tasks", "all methods"])
def test_whole_smoke_runs(line, folder, capsys):
    assert typed(line, folder) == 0
    assert "Not complete" not in capsys.readouterr().out
