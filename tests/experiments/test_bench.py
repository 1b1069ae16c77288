"""The benchmark as a program: its rows, files and exit status. Its times are never asserted."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from cola import Chain, ChainOptimizer, LinkConfig, NeverKnots
from experiments import bench
from experiments.__main__ import main
from experiments.bench import cost, export, knot, layer, measure, models, report, scaling, step, tie
from experiments.bench.measure import Row, Settings, Spread, peak_bytes, race, ratio, saved_bytes
from experiments.memory import peak_memory
from tests.kernels import kernels

pytest.importorskip("peft", reason="PEFT is what the benchmark compares with")
SMOKE = Settings(smoke=True)
NAMES = ["layer/bf16/1024x768", "step/llama", "overhead", "tie/bf16/4096", "chain", "export", "scaling"]
NAMES += ["kinds/experts/grouped_mm", "kinds/embedding", "kinds/tie"]


def test_from_end_to_end(tmp_path, capsys):
    assert main(["bench", "--smoke", "--seed", "3", "--out", str(tmp_path), "--rows", *NAMES]) == 0
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["name"]: row for row in written["rows"]}
    for name in NAMES:
        assert any(row.startswith(name) for row in rows)
    assert not any(row.startswith(("layer/fp32", "import", "knot")) for row in rows)
    assert {row["right"] for row in rows.values()} == {True, None}
    assert rows["overhead/waits"]["value"]["median"] == 0
    assert rows["chain/device"]["value"]["median"] == 0
    assert rows["chain/host"]["value"]["median"] == 1
    assert rows["layer/bf16/1024x768/dropout/saved"]["reached"]
    assert written["settings"]["seed"] == 3
    assert {"torch", "peft"} <= set(written["versions"])
    assert (tmp_path / "bench.md").read_text().strip() == shown.strip()
    assert all(len(line.split("|")) == 10 for line in shown.splitlines() if line.startswith("|"))
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "nonsense"], "names no row: choose from layer/fp32"),
        (["--rows", "chain", "nonsense"], "--rows 'nonsense' names no row"),
        (["--rows", ""], "--rows '' names no row"),
        (["--threads", "0"], "argument --threads: 0: give"),
        (["--seconds", "0"], "argument --seconds: 0: give a number above 0"),
        (["--seconds", "nan"], "nan: give a number above 0"),
        (["--clock", "cpu", "--threads", "2"], "use it"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, tmp_path, capsys):
    assert main(["bench", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_refused_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "bench" / "bench.md").mkdir(parents=True)
    for out in ("file", "file/below", "bench"):
        assert main(["bench", "--out", str(tmp_path / out)]) == 2
        assert f"--out {tmp_path / out} cannot be written" in capsys.readouterr().err


def test_one_group_that_fails_does_not_take_the_others_with_it(tmp_path, monkeypatch, capsys):
    def broken(settings):
        yield Row("a/half", "", Spread.of([1.0]))
        raise RuntimeError("no compiler")

    class Group:
        @staticmethod
        def cases():
            yield "a", broken
            yield "b", lambda settings: [Row("b", "", Spread.of([1.0]))]

    monkeypatch.setattr(bench, "GROUPS", (Group,))
    assert main(["bench", "--out", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert "no compiler" in errors
    assert "not measured, for the errors above: a" in errors
    assert [row["name"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]] == ["a/half", "b"]


@pytest.mark.parametrize(
    ("row", "strict", "status"),
    [
        (Row("a", "", Spread.of([1.0]), 2.0, right=True), True, 0),
        (Row("a", "", Spread.of([3.0]), 2.0), False, 0),
        (Row("a", "", Spread.of([3.0]), 2.0), True, 1),
        (Row("a", "", Spread.of([3.0]), 2.0, at_least=True), True, 0),
        (Row("a", "", Spread.of([1.0]), 2.0, right=False), False, 1),
    ],
)
def test_the_exit_status(row, strict, status, tmp_path, monkeypatch, capsys):
    class Group:
        @staticmethod
        def cases():
            yield "a", lambda settings: [row]

    monkeypatch.setattr(bench, "GROUPS", (Group,))
    assert main(["bench", "--out", str(tmp_path), *["--strict"] * strict]) == status
    assert ("wrong results: a" in capsys.readouterr().err) == (row.right is False)


@pytest.mark.parametrize(
    ("value", "floor", "shown"),
    [
        (1.2, None, "FAIL"),
        (1.2, Spread(1.05, 1.04, 1.06, 9), "FAIL"),
        (1.2, Spread(1.15, 1.14, 1.16, 9), "FLOOR"),
        (1.2, Spread(1.15, 1.09, 1.16, 9), "FAIL"),
        (1.05, Spread(1.15, 1.14, 1.16, 9), "PASS"),
    ],
)
def test_a_target_below_the_floor_is_told_from_one_that_was_missed(value, floor, shown):
    row = Row("a", "", Spread.of([value]), 1.1, floor=floor)
    assert report.verdict(row) == shown
    assert row.reached is (shown == "PASS")


def test_the_floor_of_a_step_multiplies_as_often_as_the_links():
    """Six products a layer, but five in the first q, k and v, whose input asks for no gradient."""
    model = models.llama_like(smoke=True)
    ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LinkConfig(r=8, target_modules="all-linear"))
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    least = step.bare(layers, lambda: model(input_ids=models.batch(model, 1, 8, SMOKE.generator())))
    counts = kernels(least)
    assert counts["mm"] + counts["addmm_"] == 2 * 7 * 6 - 3


def test_a_race_runs_everyone_in_every_round():
    calls = []
    times = race({name: (lambda name=name: calls.append(name)) for name in "abc"}, SMOKE, rounds=(4, 4))
    assert {len(t) for t in times.values()} <= {2, 3}
    assert set(calls) == set("abc")
    assert [calls[i] for i in range(6)] == list("abcabc")  # the warm-up
    pairs = ratio({"a": np.array([2.0, 8.0, 3.0]), "b": np.array([1.0, 2.0, 3.0])}, "a", "b")
    assert (pairs.median, pairs.count) == (2.0, 3)
    assert pairs.low == pytest.approx(1.2)


def test_memory_is_what_was_held_at_once():
    def run():
        a = torch.empty(1 << 20, dtype=torch.uint8)
        del a
        b = torch.empty(1 << 19, dtype=torch.uint8)
        c = torch.empty(1 << 20, dtype=torch.uint8)
        return b, c

    assert 3 << 19 <= peak_bytes(run) < (3 << 19) + 1024
    linear, x = torch.nn.Linear(4, 8), torch.zeros(2, 4, requires_grad=True)
    assert saved_bytes(torch.nn.Sequential(linear, torch.nn.Sigmoid()), x) == (2 * 4 + 2 * 8) * 4


def test_the_comparisons_notice_a_wrong_result():
    layers = layer.contenders(32, torch.float32, 0.0, SMOKE)
    x, upstream = torch.randn(8, 32, requires_grad=True), torch.randn(8, 32)
    assert layer.agree(layers, x, upstream)
    with torch.no_grad():
        layers["cola"].proj.lora_B.mul_(1.01)
    assert not layer.agree(layers, x, upstream)
    W, L, R = torch.randn(64, 32), torch.randn(64, 8), torch.randn(8, 32)
    assert tie.is_right(W, L, R, "nearest", 0)
    assert not tie.is_right(W, L, R * float("nan"), "nearest", 0)
    model = nn.Sequential(nn.Linear(2, 2))
    ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=LinkConfig(r=1, target_modules="all-linear"), lr=0.1)
    nn.init.ones_(model[0].lora_B)
    inputs = torch.ones(1, 2)
    base = nn.functional.linear(inputs, model[0].weight, model[0].bias).sum().item()
    assert knot.without_link(model, lambda: model(inputs).sum().item()) == base
    assert model[0].lora_B.eq(1).all()
    with step.Reads() as reads:
        torch.ones(()).item()
    assert reads.count == 1


def test_an_export_that_writes_something_else_is_wrong(monkeypatch):
    (row,) = export.svd(SMOKE)
    assert row.right
    honest = Chain.to_peft

    def other(self, directory, r):
        errors = honest(self, directory, r=r)
        honest(self, directory, r=r - 1)
        return errors

    monkeypatch.setattr(Chain, "to_peft", other)
    (row,) = export.svd(SMOKE)
    assert row.right is False


def test_the_cost_of_methods_on_a_model(monkeypatch):
    monkeypatch.setattr(cost, "alone", cost.memory)  # not in a process of its own, which the next test does
    rows = {row.name: row for row in cost.rows(Settings(smoke=True, model="tiny-prose"))}
    methods = [name for name in cost.METHODS if f"cost/step/{name}" in rows]
    assert {"peft", "lora", "cola", "finetune"} <= set(methods)
    assert rows["cost/step/lora"].right is True
    state = {name: rows[f"cost/memory/{name}"].details["trained_bytes"] for name in methods}
    assert state["peft"] == state["lora"] == state["cola"] < state["finetune"]
    # two layers of width 64: weights, gradients and two moments of A and B on q and v, and a count per factor
    assert state["lora"] == 2 * 2 * 2 * (4 * 8 * 64 * 4 + 4)
    lines = cost.table(list(rows.values())).splitlines()
    assert len(lines) == 2 + len(methods)
    assert {line.count("|") for line in lines} == {8}


def test_a_method_that_fails_leaves_the_other_costs(monkeypatch, tmp_path, capsys):
    """As one does whose process is killed for its memory."""

    peak = dict.fromkeys(["peak_bytes", "above_bytes", "trained_bytes"], 1e6)

    def rows(settings):
        yield Row("cost/step/peft", "", Spread.of([1.0]), details={"step_s": 0.5})
        yield Row("cost/step/galore", "", Spread.of([2.0]), details={"step_s": 1.0})
        yield Row(
            "cost/memory/peft",
            "",
            Spread.of([1.0]),
            details=peak,
        )
        raise MemoryError

    monkeypatch.setattr(cost, "rows", rows)
    assert main(["bench", "--rows", "cost", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "| LoRA of PEFT | 0.5 | 1 |  | 1 | 1 | 1 |" in shown.out
    assert "| GaLore | 1 | 2 |  |  |  |  |" in shown.out
    assert "not measured, for the errors above: cost" in shown.err


@pytest.mark.long
def test_the_memory_of_a_method_is_that_of_a_process_of_its_own():
    ballast = torch.ones(1 << 28)  # 1 GiB here, which must not count there
    found = cost.alone("cola", "tiny-prose", SMOKE)
    assert 0 < found["above_bytes"] < found["peak_bytes"] < ballast.nbytes


def test_a_model_that_is_not_to_be_had_leaves_the_cost_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cost, "MODEL", str(tmp_path / "none"))
    with pytest.warns(UserWarning, match="cost is left out"):
        assert list(cost.rows(Settings())) == []
    arguments = ["bench", "--rows", "cost", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert f"--model {tmp_path / 'none'}:" in capsys.readouterr().err


def test_the_peak_of_memory_is_that_of_the_work():
    size = 1 << 26
    before, peak = peak_memory(lambda: torch.ones(size, dtype=torch.uint8))
    assert size - (1 << 20) <= peak - before < 2 * size  # the system counts pages in batches


def test_slopes_are_those_of_the_points():
    x = [1, 2, 4, 8, 16]
    curve = scaling._curve("width", x, [(3.0 * n**2, 1.0) for n in x], 2.0, "")
    assert curve.slope == pytest.approx(2.0)
    assert measure.Spread.of([1.0]).count == 1
