"""The command ``python -m theory.fw_gap``: its options, exit status and files, also for a failing check."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest

from tests.theory.checks import mutations
from theory import fw_gap
from theory.checks import audit, significance
from theory.command_line import one_thread
from theory.frank_wolfe import frank_wolfe
from theory.problems.instances import INSTANCES, TIGHT
from theory.suite import plots, tasks
from theory.suite.tasks import Task

pytestmark = pytest.mark.numerics


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_list_names_every_instance(capsys):
    assert fw_gap.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in INSTANCES)
    tight, loose = out.split("loose instances")
    assert all(f"  {name} " in (tight if name in TIGHT[:-1] else loose) for name in INSTANCES)


def test_one_instance_writes_table_json_and_pictures(tmp_path, capsys):
    horizons = ["50", "100", "200", "400"]
    assert fw_gap.main(["--instance", "A", "F", "--T", *horizons, "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "A rate" in table
    assert "0 FAIL" in table
    rows = lines(tmp_path)
    assert [row["label"] for row in rows] == ["A"] * 4 + ["A rate"] + ["F"] * 4 + ["F rate"]
    assert {row["verdict"] for row in rows} == {"PASS"}
    assert rows[0]["average_over_s"] == pytest.approx(rows[0]["average"] / rows[0]["s"])
    for picture in ("average_gap.png", "gap_along_a_run.png", "tightness.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, label",
    [
        (["--step", "short"], "F short"),
        (["--oracle", "lanczos"], "F lanczos"),
        (["--oracle", "additive", "--epsilon", "0.05"], "F eps=0.05"),
        (["--epsilon", "0.1"], "F eps=0.1"),
        (["--oracle", "multiplicative", "--rho", "0.5"], "F rho=0.5"),
        (["--batch", "16", "--seeds", "2"], "F b=16"),
    ],
)
def test_settings_reach_the_run(options, label, tmp_path):
    arguments = ["--instance", "F", "--T", "100", "--no-plots", "--out", str(tmp_path), *options]
    assert fw_gap.main(arguments) == 0
    rows = lines(tmp_path)
    assert {row["label"] for row in rows} == {label}
    assert len(rows) == (2 if "--seeds" in options else 1)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--instance", "Z"], "--instance 'Z' is not known: choose from A, A-ray"),
        (["--step", "exact"], "--step 'exact' is not known: choose from theorem"),
        (["--T", "0"], "--T must be at least 1, got 0"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--epsilon", "0.1", "--rho", "0.5"], "--epsilon and --rho name different oracles"),
        (["--oracle", "lanczos", "--epsilon", "0.1"], "--epsilon has no effect on --oracle lanczos"),
        (["--oracle", "own", "--rho", "0.5"], "--rho has no effect on --oracle own"),
        (["--instance", "F", "--seeds", "3"], "--seeds has no effect on named runs without --batch"),
        (["--instance", "F", "--sigma", "3"], "--sigma has no effect without --batch"),
        (["--oracle", "additive"], "--oracle additive needs --epsilon"),
        (["--oracle", "multiplicative"], "--oracle multiplicative needs --rho"),
        (
            ["--instance", "B", "--oracle", "lanczos", "--T", "5"],
            "--oracle lanczos needs a trace ball, got Simplex",
        ),
        (["--instance", "F", "--epsilon", "-1", "--T", "5"], "epsilon must be a finite number of at least 0"),
        (
            ["--instance", "F", "--batch", "-4", "--T", "5"],
            "batch must be a whole number of at least 1, got -4",
        ),
    ],
)
def test_bad_options_end_with_status_two(options, message, tmp_path, capsys):
    assert fw_gap.main([*options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("seed", [-1, -(2**70), 2**63, 10**40])
def test_any_whole_number_is_a_seed(seed, tmp_path):
    """The options draw from every stream of the command: data, batches, oracles, and checks of an estimate."""
    options = ["--instance", "tanh", "A-ray", "--batch", "4", "--T", "20", "--seeds", "2", "--no-plots"]
    assert fw_gap.main([*options, "--seed", str(seed), "--out", str(tmp_path)]) == 0
    assert len({row["seed"] for row in lines(tmp_path)}) == 4  # two runs of each instance, with draws of their own


def test_blas_gets_one_thread_unless_the_environment_says_otherwise(monkeypatch):
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")
    environment = {"MKL_NUM_THREADS": "3"}
    monkeypatch.setattr(os, "environ", environment)
    one_thread()
    assert environment == {"MKL_NUM_THREADS": "3"}
    environment.clear()
    one_thread()
    assert environment == dict.fromkeys(names, "1")


def test_the_table_shows_the_seed_of_a_run_and_the_number_of_runs(capsys, tmp_path, monkeypatch):
    few = [Task("batches", lambda: tasks.batch_task((4,), 3, seed=5, T=20)), Task("A", lambda: [tasks.single("A", 20)])]
    monkeypatch.setattr(tasks, "standard", lambda *args: few)
    assert fw_gap.main(["--no-plots", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^F batch 4 +3 runs +20 ", out, re.MULTILINE)
    assert re.search(r"^A +0 +20 ", out, re.MULTILINE)
    assert len(set(lines(tmp_path)[0]["seeds"])) == 3


def test_a_seed_that_is_no_whole_number_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        fw_gap.main(["--seed", "1.5"])
    assert "argument --seed: invalid int value: '1.5'" in capsys.readouterr().err


def test_no_noise_is_no_noise(tmp_path):
    options = ["--instance", "F", "--T", "50", "--batch", "1", "--seeds", "1", "--sigma", "0", "--no-plots"]
    assert fw_gap.main([*options, "--out", str(tmp_path)]) == 0
    plain = frank_wolfe(INSTANCES["F"].build(50, 0), 50)
    assert lines(tmp_path)[0]["average"] == plain.average


def test_a_closed_pipe_ends_without_a_traceback():
    command = [sys.executable, "-u", "-m", "theory.fw_gap", "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


def test_a_failing_check_sets_the_exit_status_and_is_named(tmp_path, capsys, monkeypatch):
    run = mutations.quarter_beta()
    broken = Task("broken", lambda: [tasks.run_record("broken", run, 0.0, audit(run))])
    monkeypatch.setattr(tasks, "standard", lambda *args: [broken])
    assert fw_gap.main(["--no-plots", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAIL broken (T = 400): curvature <= beta: 4 against 1" in out
    assert not re.search(r"^FAIL .*; *$", out, re.MULTILINE)
    assert lines(tmp_path)[0]["verdict"] == "FAIL"


def test_module_entry_point_and_help():
    done = subprocess.run([sys.executable, "-m", "theory.fw_gap", "--help"], capture_output=True, text=True, check=True)
    assert "Check Theorem 4.1" in done.stdout
    for flag in (
        "--instance",
        "--step",
        "--oracle",
        "--T",
        "--seeds",
        "--seed",
        "--epsilon",
        "--batch",
        "--out",
    ):
        assert flag in done.stdout


def test_importing_the_package_touches_nothing():
    """No matplotlib, no torch, no cola, and no change of the global generator on import."""
    code = """
import sys, numpy
before = numpy.random.get_state()[1].copy()
import theory.fw_gap, theory.theorem, theory.oracles.lanczos
assert (before == numpy.random.get_state()[1]).all()
print(sorted({m.split('.')[0] for m in sys.modules} & {'matplotlib', 'torch', 'cola', 'tqdm', 'copt'}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.long
def test_standard_suite_passes(tmp_path):
    assert fw_gap.main(["--out", str(tmp_path)]) == 0
    rows = lines(tmp_path)
    assert len(rows) > 100
    levels = [check["level"] for row in rows for check in row["checks"] if check["level"]]
    assert 30 < len(levels) <= significance.CHECKS
    assert sum(levels) <= significance.FAMILY
    assert len(list(tmp_path.glob("*.png"))) == 5


def without(*names):
    """A command that starts Python as if packages were not installed, and runs a module with the arguments after it."""
    code = (
        "import runpy, sys, importlib.util as u; find = u.find_spec; names = " + repr(names) + "\n"
        "for name in names: sys.modules[name] = None\n"
        "u.find_spec = lambda name, *rest: None if name in names else find(name, *rest)\n"
        "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("module", ["theory.fw_gap", "theory.llm_gap"])
def test_without_scipy_it_says_what_to_install(module):
    done = subprocess.run([*without("scipy"), module, "--help"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: scipy not installed: pip install scipy, or in the clone pip install -e '.[theory]'\n"


def test_without_matplotlib_there_is_the_table_and_no_picture(tmp_path):
    """And without tqdm; the table comes first, and the status is that of the checks."""
    options = ["theory.fw_gap", "--instance", "A", "--T", "50", "--out", str(tmp_path)]
    done = subprocess.run([*without("matplotlib", "tqdm"), *options], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-2] == "no picture: matplotlib is missing (pip install matplotlib)"
    assert "0 FAIL" in done.stdout
    assert done.stderr == "1 of 1 tasks, 0 s\n"


def test_help_names_each_default_once(capsys):
    from theory import bench, llm_gap

    for module in (fw_gap, llm_gap, bench):
        with pytest.raises(SystemExit) as stopped:
            module.main(["--help"])
        assert stopped.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "(default: runs/" in shown
        assert re.search(r"--seed N [\w, ]+ \(default: 0\)", shown)
        assert not re.search(r"default: (None|False|True)", shown)
        assert not re.search(r"\(default:? [^()]*\) \(default", shown)


@pytest.mark.parametrize("command", ["fw_gap", "llm_gap", "bench"])
@pytest.mark.parametrize(
    "out, why",
    [("file/below", "{tmp}/file is a file"), (300 * "x", "File name too long")],
    ids=["below a file", "long"],
)
def test_a_folder_that_cannot_be_written_is_refused_first(command, out, why, tmp_path, capsys):
    (tmp_path / "file").touch()
    module, out = importlib.import_module(f"theory.{command}"), str(tmp_path / out)
    try:
        status = module.main(["--out", out])
    except SystemExit as stopped:  # argparse
        status = stopped.code
    assert status == 2
    said = capsys.readouterr()
    assert f"--out must be a folder to write, got '{out}': {why.format(tmp=tmp_path)}\n" in said.err
    assert not said.out


def test_several_horizons_are_drawn_against_T(monkeypatch, tmp_path):
    """One step rule with several T; several rules share one T."""
    drawn = []
    monkeypatch.setattr(plots, "along_a_run", lambda runs, path: drawn.append(runs) or path)
    options = ["--out", str(tmp_path), "--instance", "A", "F"]
    assert fw_gap.main([*options, "--T", "20", "40", "80"]) == 0
    assert [(run.problem.name[0], run.T) for run in drawn.pop()] == [("F", 20), ("F", 40), ("F", 80)]
    assert fw_gap.main([*options, "--T", "20", "--step", "short", "theorem"]) == 0
    assert [(run.problem.name[0], run.step.name) for run in drawn.pop()] == [("F", "short"), ("F", "theorem")]
