"""The commands, as typed."""

import pytest

from experiments.__main__ import COMMANDS, main
from experiments.frontier import demo


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().err
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("argv", [["dmeo"], ["frontier", "--methods", "nonsense"], ["pretrain", "--steps", "many"]])
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
