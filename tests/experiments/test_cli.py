"""The commands, as typed."""

import json

import pytest

from cola import Chain
from experiments.__main__ import COMMANDS, main
from experiments.study import demo
from experiments.study.demo_report import Check


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().err
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("argv", [["dmeo"], ["demo", "--arms", "nonsense"], ["pretrain", "--steps", "many"]])
def test_wrong_arguments_are_refused_with_the_choices(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "invalid" in capsys.readouterr().err


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
def test_every_command_has_help_with_seed_and_out(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--seed" in shown
    assert "--out" in shown


def test_the_demo_from_end_to_end(tmp_path, capsys):
    arms = ["lora", "cola-2", "cola-plateau", "full"]
    assert main(["demo", "--smoke", "--workers", "1", "--seed", "5", "--out", str(tmp_path), "--arms", *arms]) == 0
    shown = capsys.readouterr()
    assert "seeds 5, 6" in shown.out
    assert "100%" in shown.err
    written = json.loads((tmp_path / "results.json").read_text())
    assert [row["arm"] for row in written["rows"]] == arms
    assert written["seeds"] == [5, 6]
    assert {arm: method["links"] for arm, method in written["methods"].items()} == dict(zip(arms, (1, 2, 4, 1)))
    assert all(check["holds"] for check in written["checks"])
    tested = [run for run in written["runs"] if run["test"] is not None]
    assert len(tested) == len(arms) * 2 < len(written["runs"])
    assert written["command"] == f"python -m experiments demo --seed 5 --arms {' '.join(arms)} --smoke"
    assert (tmp_path / "table.txt").read_text().strip() in shown.out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("scratch-*"))
    assert any("rebuild" in check["what"] for check in written["checks"])
    assert {run["rebuilt"] for run in tested} == {0.0, None}
    assert len([run for run in tested if run["rebuilt"] is None]) == 2  # those of full fine-tuning
    assert [len(Chain.load(tmp_path / "chains" / arm)) for arm in arms[:2]] == [1, 2]


def test_the_demo_says_what_is_wrong(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--model", str(tmp_path / "none")]) == 2
    assert "has no model.safetensors" in capsys.readouterr().err
    assert main(["demo", "--smoke", "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert "--seeds=0" in capsys.readouterr().err
    for flag, value, message in (
        ("--rank", "0", "r=0"),
        ("--init", "zero", "init='zero'"),
        ("--decay", "2", "--decay=2.0"),
        ("--warmup", "-1", "--warmup=-1"),
        ("--rates", "nan", "--rates nan"),
        ("--rank", "60", "arm lora-wide (LoRA, rank 180): r=180 is above the rank of layer"),
    ):
        assert main(["demo", "--full", "--out", str(tmp_path), flag, value]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert f"--out {tmp_path / 'file'} cannot be made" in capsys.readouterr().err


def test_a_check_that_fails_is_the_exit_status(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "checks", lambda *args, **kwargs: [Check("it is as it should be", False, "it is not")])
    assert main(["demo", "--smoke", "--workers", "1", "--seeds", "1", "--arms", "lora", "--out", str(tmp_path)]) == 1
    assert "FAIL it is as it should be (it is not)" in capsys.readouterr().out
