"""The README's table of sensitivities: each cell holds, and the percentage below it does not."""

import math
import re
from pathlib import Path

import pytest

import theory
from theory import fw_gap
from theory.suite import sensitivity
from theory.suite.sensitivity import CONSTANTS, HEAD, HORIZONS, PERCENT, seen, signs

pytestmark = pytest.mark.numerics

README = (Path(theory.__file__).parent / "README.md").read_text(encoding="utf-8")
ROWS = {
    cells[0]: cells[1:]
    for line in README.split(HEAD)[1].split("\n\n")[0].strip().splitlines()
    if (cells := [cell.strip() for cell in line.strip("|").split("|")])
}
# its runs take some hundredths of a second
QUICK = ("A",)


def check(name):
    horizon, *cells = ROWS[name]
    assert int(horizon) == HORIZONS[name]
    for constant, cell in zip(CONSTANTS, cells, strict=True):
        ways = signs(name, constant)
        if cell == "–":
            assert seen(name, constant, 0.5) is None
            continue
        percent = math.inf if cell == "no" else float(re.search(r"[\d.]+", cell).group())
        least = PERCENT.index(percent) if cell != "no" else len(PERCENT)
        if least < len(PERCENT):
            assert all(seen(name, constant, 1 + sign * percent / 100) for sign in ways), constant
        if least > 0:
            assert not all(seen(name, constant, 1 + sign * PERCENT[least - 1] / 100) for sign in ways), constant


def test_every_instance_but_the_quadratics_has_a_row():
    assert list(ROWS) == list(HORIZONS)


@pytest.mark.parametrize("name", QUICK)
def test_cells(name):
    check(name)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in HORIZONS if name not in QUICK])
def test_cells_of_longer_runs(name):
    check(name)


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_right_constant_passes(constant):
    assert not any(seen(name, constant, 1.0, T=60) for name in ("A", "F", "tanh"))


def test_the_command_prints_the_row(capsys, monkeypatch):
    monkeypatch.setitem(sensitivity.HORIZONS, "A", 20)
    assert fw_gap.main(["--sensitivity", "--instance", "A"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == HEAD.splitlines()
    # few draws of a single entry do not tell the size of the noise
    assert re.fullmatch(r"\| A \| 20 (\| −[\d.]+ % ){3}(\| ±0\.1 % ){2}\| no \| ±0\.1 % \|", shown[2]), shown
    assert fw_gap.main(["--sensitivity", "--instance", "quadratic-l1-interior"]) == 2
    assert "--sensitivity has no instance 'quadratic-l1-interior'" in capsys.readouterr().err
