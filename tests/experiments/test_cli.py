"""The commands, as typed."""

import os
import re
import subprocess
import sys

import pytest

from experiments.__main__ import COMMANDS, main
from experiments.frontier import demo
from experiments.report import style
from experiments.report.progress import Progress
from experiments.tiny import pretrain


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().err
    assert all(name in shown for name in COMMANDS)


WRONG = [
    ("dmeo", "invalid choice: 'dmeo' (choose from"),
    ("frontier --methods nonsense", "invalid choice: 'nonsense' (choose from"),
    ("pretrain --steps many", "argument --steps: many: give a whole number of at least 1"),
    ("pretrain --lr nan", "argument --lr: nan: give a number above 0"),
    ("study --smoke --search-seeds 6", "--search-seeds 6 exceeds the number of seeds, 5 (--seeds)"),
    ("demo --seed -1", "argument --seed: -1: give a whole number from 0 to 4294967295"),
    ("bench --seed 4294967296", "argument --seed: 4294967296: give a whole number from 0 to 4294967295"),
    ("frontier --see 3", "unrecognized arguments: --see 3"),
    ("frontier --task slow --seeds 2 --search-seeds 3", "--search-seeds 3 exceeds the number of seeds, 2 (--seeds)"),
    ("map --task slow --seeds 2 --search-seeds 3", "--search-seeds 3 exceeds the number of seeds, 2 (--seeds)"),
    ("study --seeds 2 --search-seeds 3", "--search-seeds 3 exceeds the number of seeds, 2 (--seeds)"),
    ("table 6 --smoke --search-seeds 3", "--search-seeds 3 exceeds the number of seeds, 2 (--seeds)"),
    ("demo --workers 0", "argument --workers: 0: give a whole number of at least 1"),
    ("map --task slow --workers -1", "argument --workers: -1: give a whole number of at least 1"),
    ("study --workers 0", "argument --workers: 0: give"),
    ("rounding --links 0", "argument --links: 0: give"),
    ("rounding --links 9 --steps 8", "--links 9 in --steps 8: a link needs at least one step"),
    ("rounding --model ./none", "model='none' has no model.safetensors; make one with"),
    ("bench --threads 0", "argument --threads: 0: give"),
    ("run --task CB --method galore --model tiny --lr 1e-3", "invalid choice: 'galore'"),
    (
        "run --task CB --method lora --model tiny",
        "--method lora trains: give its peak learning rate, such as --lr 1e-3",
    ),
    ("run --task CX --method icl --model tiny", "task='CX' is none of SST-2"),
    ("run --task CB --method cola --lr 1 --knots often", "knots='often': use epochs, even"),
    ("study --model ./none --offline", "model='./none': there is no such folder"),
    ("study --corpus none.txt", "corpus='none.txt': there is no such file; give a text file in UTF-8, prose or code"),
    ("study --length 257", "--length=257: the model reads at most 256 tokens per block"),
    ("frontier --task code --model ./none --offline", "model='./none': there is no such folder"),
    ("frontier --task shakespeare --model tiny --corpus none.txt", "corpus='none.txt': there is no such file"),
]


@pytest.mark.parametrize("line, message", WRONG, ids=[line for line, _ in WRONG])
def test_wrong_arguments_are_refused_in_words(line, message, tmp_path, capsys, offline_again):
    """Before anything runs, so nothing is written."""
    out = [] if line == "dmeo" else ["--out", str(tmp_path / "out")]
    assert main([*line.split(), *out]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.fixture
def offline_again(monkeypatch):
    """What `--offline` sets for the process is undone after the test."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)


NOT_TO_WRITE = {
    "below a file": ("{tmp}/file/below", "{tmp}/file is a file"),
    "too long": ("{tmp}/" + 300 * "x", "File name too long"),
    # root passes os.access there
    "not for root": pytest.param("/proc/new", "", marks=pytest.mark.skipif(sys.platform != "linux", reason="no /proc")),
}


@pytest.mark.parametrize("out, why", NOT_TO_WRITE.values(), ids=NOT_TO_WRITE)
@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_folder_that_cannot_be_written_is_refused_first(name, out, why, tmp_path, capsys):
    (tmp_path / "file").touch()
    out, why = out.format(tmp=tmp_path), why.format(tmp=tmp_path)
    needed = {"run": ["--task", "CB", "--method", "icl"], "table": ["1"], "figure": ["2"]}.get(name, [])
    assert main([name, *needed, "--out", out]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{name}: --out {out} cannot be written: {why}")
    assert said.endswith("; give another folder\n")


def test_only_a_folder_that_the_command_made_and_left_empty_is_removed(tmp_path):
    refused = ["rounding", "--links", "9", "--steps", "8", "--out"]
    assert main([*refused, str(tmp_path / "new" / "below")]) == 2
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    assert main([*refused, str(tmp_path / "there")]) == 2
    assert (tmp_path / "there").exists()


def test_an_interrupt_is_said_and_no_traceback(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "main", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "\ndemo: interrupted\n"


def test_a_library_that_is_missing_is_named(monkeypatch, capsys):
    def needs(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(demo, "main", lambda arguments: needs("peft.tuners"))
    assert main(["demo"]) == 2
    assert "demo: peft is not installed: pip install peft" in capsys.readouterr().err
    monkeypatch.setattr(demo, "main", lambda arguments: needs("experiments.none"))
    with pytest.raises(ModuleNotFoundError, match=r"experiments\.none"):
        main(["demo"])


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_with_seed_and_out_and_each_default_once(name, capsys):
    assert main([name, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--out DIR folder to write (default: runs/" in shown
    assert re.search(r"--seed N [\w ]+ \(default: 0\)", shown)
    assert not re.search(r"default: (None|False|True|\[)", shown)
    assert not re.search(r"\(default: [^()]*\) \(default", shown)


#: what may ask a hub
ASKING = ("run", "study", "frontier", "map", "table", "figure")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_that_may_ask_a_hub_can_be_kept_offline(name, capsys):
    main([name, "--help"])
    assert ("--offline" in capsys.readouterr().out) == (name in ASKING)


def test_a_picture_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = style.picture(tmp_path / "x.png", lambda path: style.pyplot())
    assert said == "no picture: matplotlib is missing (pip install matplotlib)"

    def other(path):
        raise ModuleNotFoundError("No module named 'experiments.none'", name="experiments.none")

    with pytest.raises(ModuleNotFoundError):
        style.picture(tmp_path / "x.png", other)


def test_progress_in_a_pipe_is_a_line_for_every_tenth(capsys):
    for _ in Progress(range(200), desc="pretrain", unit="step"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("pretrain: 20 of 200 steps, 00:00 so far, about 00:00 to go")
    assert lines[-1].startswith("pretrain: 200 of 200 steps, 00:00 so far")


def test_progress_counts_what_was_done_before(capsys):
    with Progress(total=0, unit="cell") as bar:
        bar.initial, bar.n, bar.total = 7, 7, 10
        bar.refresh()
        bar.write("a message", file=sys.stderr)
        bar.set_postfix_str("one", refresh=False)
        bar.update(3)
    assert [re.sub(r"\d\d:\d\d", "t", line) for line in capsys.readouterr().err.splitlines()] == [
        "7 of 10 cells, t so far",
        "a message",
        "10 of 10 cells, t so far, one",
    ]


def test_progress_on_a_terminal_is_a_bar():
    """A pseudo-terminal gets tqdm's bar, redrawn in place."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    code = "from experiments.report.progress import Progress; list(Progress(range(3), unit='step'))"
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "\r" in shown
    assert "3/3" in shown


def test_pretrain_names_the_torch_that_it_needs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(pretrain, "NEEDS", "pretrain needs torch.optim.Muon")
    assert main(["pretrain", "--out", str(tmp_path / "out")]) == 2
    assert "torch.optim.Muon" in capsys.readouterr().err
