"""`experiments gpu`: what is missing is named, stages are stopped and gone on with, and the dry run does them all."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from experiments import gpu
from experiments.__main__ import main
from experiments.files import locked
from experiments.gpu import Stage

QUIET = ("-c", "print('quiet')")


def dry(out, *more):
    return main(["gpu", "--dry-run", "--out", str(out), *more])


def record(out, name):
    return json.loads((out / f"{name}.json").read_text())


@pytest.fixture
def staged(monkeypatch):
    """A function that replaces the stages by programs of one's own: name, limit, arguments of Python."""

    def replace(*programs):
        found = [Stage(name, f"the {name} one", limit, command) for name, limit, command in programs]
        monkeypatch.setattr(gpu, "stages", lambda arguments, model, data: found)

    return replace


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "--data-dir", "nowhere"], "--data-dir nowhere is no folder; without the option, rows are made"),
        (["--dry-run", "--model", "./nowhere"], "--model ./nowhere: "),
        (["--minutes", "0"], "argument --minutes: 0: give a number above 0"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_with_the_way_to_get_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "MODULES", {"torch": "torch", "no_such_module": "no-such", "nor_this": "nor-this"})
    assert dry(tmp_path) == 2
    errors = capsys.readouterr().err
    assert f"packages: no-such nor-this. Get them by `{sys.executable} -m pip install no-such nor-this`" in errors
    assert "--no-index --find-links wheels no-such nor-this" in errors


def test_a_python_without_any_package_is_told_all_of_them(tmp_path):
    command = [sys.executable, "-S", "-m", "experiments", "gpu", "--dry-run", "--out", str(tmp_path)]
    found = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert f"packages: {' '.join(gpu.MODULES.values())}. Get them by" in found.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused(tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path)]) == 2
    assert f"a GPU: torch {torch.__version__} sees none" in capsys.readouterr().err


def test_too_little_disk_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "DISK", 1e9)
    assert main(["gpu", "--out", str(tmp_path)]) == 2
    assert "1e+09 are needed; choose another folder by --out" in capsys.readouterr().err


def test_two_calls_do_not_share_a_folder(tmp_path, staged, capsys):
    staged(("good", 60, QUIET))
    with locked(tmp_path / "lock"):
        assert dry(tmp_path) == 2
    assert "another call is at work in" in capsys.readouterr().err
    assert dry(tmp_path) == 0


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path, staged, capsys):
    child = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE).pid"
    )
    staged(
        ("good", 60, QUIET),
        ("slow", 5, ("-c", f"{child}, flush=True); import time; time.sleep(60)")),
        ("bad", 60, ("-c", "print('so it is'); raise SystemExit(3)")),
    )
    assert dry(tmp_path) == 1
    assert record(tmp_path, "slow")["status"] == "stopped at its limit"
    assert "slow: the slow one, at most 5 s" in capsys.readouterr().out
    assert record(tmp_path, "bad")["status"] == "failed with status 3"
    (pid,) = map(int, record(tmp_path, "slow")["output"].split())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    text = (tmp_path / "gpu.md").read_text()
    assert "| the good one | done |" in text
    assert "| the slow one | stopped at its limit |" in text
    assert "so it is" in text
    before = record(tmp_path, "good")

    staged(("good", 60, ("-c", "raise SystemExit(1)")), ("slow", 60, QUIET), ("bad", 60, QUIET), ("new", 60, QUIET))
    capsys.readouterr()
    assert dry(tmp_path) == 0
    shown = capsys.readouterr().out
    assert "good: done before" in shown
    assert "slow: the slow one, at most 120 s" in shown  # twice what it had
    assert shown.index("new: the new one") < shown.index("slow: the slow one")  # the others first
    assert record(tmp_path, "good") == before
    (tmp_path / "bad").mkdir()
    assert dry(tmp_path, "--seed", "1") == 1  # other circumstances: everything anew
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stage_ends_with_the_command(number, tmp_path, staged):
    """It would hold the GPU while the next call measures there."""
    stage = f"import os, pathlib; pathlib.Path('pid').write_text(str(os.getpid())); os.kill(os.getppid(), {number:d})"
    staged(("stopped", 60, ("-c", f"import os; os.chdir({str(tmp_path)!r}); {stage}; import time; time.sleep(60)")))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        gpu.main(main_arguments(tmp_path))
    assert left.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
    assert not (tmp_path / "stopped.json").exists()


def test_a_command_that_ignores_a_lost_connection_goes_on(tmp_path, staged):
    staged(("deaf", 60, ("-c", f"import os; os.kill(os.getppid(), {signal.SIGHUP:d}); print('on')")))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert dry(tmp_path) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stage_that_does_not_fit_into_the_time_is_not_begun(tmp_path, staged, capsys):
    staged(("good", 60, QUIET))
    assert dry(tmp_path, "--minutes", "0.1") == 1
    assert "good: no time left; the same command goes on here" in capsys.readouterr().out
    assert not (tmp_path / "good.json").exists()
    assert "| the good one | not run |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.long
def test_the_dry_run_does_everything(tmp_path, capsys):
    pytest.importorskip("peft")
    assert dry(tmp_path, "--minutes", "60") == 0, capsys.readouterr().out
    text = (tmp_path / "gpu.md").read_text()
    words = ["passed", "tie/bf16/4096x4096/nearest/copy", "layer/bf16/", "step/llama-2-7b", "knot/opt-1.3b"]
    words += ["chain/device", "cost/memory/cola", "on made-up rows: the score means nothing", '"best_epoch"']
    for word in words:
        assert word in text
    assert "WRONG" not in text
    made = {path.name for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert dry(tmp_path) == 0
    assert capsys.readouterr().out.count("done before") == 6
    assert {path.name for path in tmp_path.iterdir()} == made


def test_the_tests_of_a_gpu_are_found_by_the_command(tmp_path):
    (tests, *_) = gpu.stages(main_arguments(tmp_path), "tiny", "data")
    assert (gpu.ROOT / tests.command[-1]).is_file()
    assert Path(gpu.ROOT / "Makefile").read_text().count("-m experiments gpu") == 1


def main_arguments(out):
    import argparse

    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return parser.parse_args(["--dry-run", "--out", str(out)])
