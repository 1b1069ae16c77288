"""The frontier and the map: tasks, methods, what is counted as memory, and the commands on a planted task."""

import dataclasses
import json
import math
import types
from collections import defaultdict

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, NeverKnots
from experiments.__main__ import main
from experiments.frontier import families, pay_map
from experiments.frontier.picture import lengths, points
from experiments.frontier.tasks import TASKS, Gate, lasting
from experiments.memory import trained_bytes
from experiments.methods import Method
from experiments.report.stats import t_interval
from experiments.study.planted import Planted
from experiments.tiny.loss import held_out_loss


@pytest.mark.parametrize(
    ("gap", "closed", "holds"), [(0.1, 0.4, True), (0.09, 0.9, False), (0.9, 0.39, False), (-0.1, 1.0, False)]
)
def test_the_gate_wants_a_large_gap_that_rank_closes(gap, closed, holds):
    assert Gate(gap, closed).holds is holds
    assert str(Gate(gap, closed)).endswith("rank binds" if holds else "rank does not bind")


def test_every_arm_is_compared_with_lora_of_its_rank():
    arms = families.arms([2, 6], ["lora", "b-selected"])
    assert list(arms) == ["lora-2", "b-selected-2", "lora-6", "b-selected-6", "lora-18", "full"]
    assert [arm.reference for arm in arms.values()] == ["lora-2", "lora-2", "lora-6", "lora-6", "lora-6", "lora-2"]
    assert arms["b-selected-2"].method.ranks == (4,)
    assert list(families.arms([2], ["chain-10"], gate=False)) == ["lora-2", "chain-10-2"]
    dora = families.arms([2], ["dora"], gate=False)
    assert {name: arm.reference for name, arm in dora.items()} == {"peft-2": "peft-2", "dora-2": "peft-2"}


@pytest.mark.parametrize("name", list(TASKS))
def test_tasks_last_as_long_as_asked(name):
    for steps in (300, 1500, 4500):
        task = lasting(TASKS[name], steps)
        if isinstance(task, Planted):
            assert task.steps() == steps
        else:
            assert 0 <= task.epochs * (task.train // task.batch_size) - steps < task.epochs
            assert (task.epochs > 1) <= (TASKS[name].epochs > 1)


@pytest.mark.parametrize("steps", [100, 680, 1500])
def test_a_short_text_is_read_in_more_passes(steps):
    blocks = 300
    task = lasting(TASKS["shakespeare"], steps, blocks)
    assert task.train <= blocks
    assert 0 <= task.epochs * task.train // task.batch_size - steps < task.epochs


@pytest.mark.parametrize("power", [0.5, 1.5])
def test_a_planted_task_is_as_hard_as_it_says(power):
    task = Planted(power, steps_per_run=10, examples=100, noise=0.5, width=16)
    student = task.load()
    values = torch.linalg.svdvals(student.teacher)
    assert torch.allclose(values / values[0], torch.arange(1, 17.0) ** -power, atol=1e-5)
    assert values.square().sum().item() == pytest.approx(16, rel=1e-5)
    # the untouched student misses all of the labels, whose variance is 1 + 0.5² per coordinate: 5 standard errors
    assert held_out_loss(student, task.blocks().test) == pytest.approx(1.25, abs=5 * 1.25 * math.sqrt(2 / 2000 / 2))
    with torch.no_grad():
        student.layer.weight.copy_(student.teacher)
    assert held_out_loss(student, task.blocks().test) == pytest.approx(0.25, abs=5 * 0.25 * math.sqrt(2 / 32_000))
    (batches,) = task.read(0)
    batches = list(batches)
    assert [len(batch) for batch in batches] == [32, 32, 32, 4, 32, 32, 32, 4, 32, 32]
    assert torch.equal(torch.cat(batches[:4]).sort(0)[0], task.blocks().train.sort(0)[0])


def stepped(make):
    model = nn.Sequential(nn.Linear(6, 10, bias=False))
    optimizer = make(model)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    return trained_bytes(optimizer)


def chained(**link):
    config = LinkConfig(target_modules="all-linear", **link)
    return lambda model: ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=config, lr=0.1)


STEP = 4  # the count that AdamW keeps per parameter


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (chained(r=2), 4 * 4 * 2 * (6 + 10) + 2 * STEP),
        (chained(r=4, train="B", init="orthogonal"), 4 * (4 * 4 * 10 + 4 * 6) + STEP),
        (chained(r=4, train="B", init="selector"), 4 * 4 * 4 * 10 + 4 * 8 + STEP),
        (lambda model: torch.optim.AdamW(model.parameters()), 4 * 4 * 60 + STEP),
        (lambda model: torch.optim.SGD(model.parameters(), lr=0.1), 2 * 4 * 60),
    ],
)
def test_trained_state_is_parameters_gradients_moments_and_frozen_factors(make, expected):
    assert stepped(make) == expected


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setitem(TASKS, "slow", dataclasses.replace(TASKS["slow"], width=16, examples=200, steps_per_run=30))


def test_the_frontier_from_end_to_end(quick, tmp_path, capsys):
    command = ["frontier", "--task", "slow", "--ranks", "2", "--seeds", "2", "--workers", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "three times the rank closes" in shown
    written = json.loads((tmp_path / "frontier-slow-30.json").read_text())
    assert [row["arm"] for row in written["rows"]] == ["lora-2", "chain-5-2", "b-selected-2", "lora-6", "full"]
    assert (tmp_path / "frontier-slow-30.md").read_text().strip() in shown
    assert (tmp_path / "frontier-slow-30.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--so-far"]) == 0
    assert capsys.readouterr().out == shown
    other = tmp_path / "other"
    assert main([*command[:-1], str(other), "--so-far"]) == 1
    assert "no arm is complete yet" in capsys.readouterr().err
    assert not list(other.glob("frontier-*"))


def test_several_seeds_may_choose_a_rate(quick, tmp_path):
    command = ["frontier", "--task", "slow", "--ranks", "2", "--seed", "3", "--seeds", "2", "--search-seeds", "2"]
    command += ["--no-gate", "--methods", "lora", "chain-3", "--workers", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    outcomes = [json.loads(path.read_text()) for path in tmp_path.glob("cells/lora-r2*-dev-*/outcome.json")]
    losses = defaultdict(dict)
    for outcome in outcomes:
        losses[outcome["cell"]["lr"]][outcome["cell"]["seed"]] = outcome["outcome"]["dev"]
    assert len(losses) >= 3
    assert all(set(of) == {3, 4} for of in losses.values())
    row = json.loads((tmp_path / "frontier-slow-30.json").read_text())["rows"][0]
    assert row["lr"] == min(losses, key=lambda lr: sum(losses[lr].values()))


def test_the_number_of_links_has_a_picture_where_there_are_several(quick, tmp_path, capsys):
    command = ["frontier", "--task", "slow", "--ranks", "2", "--seeds", "1", "--no-gate", "--workers", "1"]
    command += ["--out", str(tmp_path), "--methods"]
    picture = tmp_path / "frontier-slow-30-links.png"
    assert main([*command, "chain-3", "b-selected"]) == 0
    assert not picture.exists()
    assert main([*command, "chain-2", "chain-3", "b-selected"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out
    assert main([*command, "chain-3"]) == 0
    assert not picture.exists()  # it would show another command's arms
    rows = [types.SimpleNamespace(arm=arm, against=types.SimpleNamespace(difference=arm)) for arm in (
        "lora-4", "chain-2-4", "chain-30-4", "b-selected-4", "chain-progress-4", "galore-4", "chain-3-16", "full",
        "chain-2-adafactor-4",
    )]  # fmt: skip
    assert lengths(rows) == {4: {2: "chain-2-4", 30: "chain-30-4"}, 16: {3: "chain-3-16"}}


def test_a_single_seed_and_a_rate_at_an_edge_are_said_to_be_so(quick, tmp_path, capsys, monkeypatch):
    short = {name: dataclasses.replace(family, rates=(8e-3, 1.6e-2)) for name, family in families.FAMILIES.items()}
    monkeypatch.setattr(families, "FAMILIES", short)
    command = ["frontier", "--task", "slow", "--ranks", "2", "--seeds", "1", "--no-gate", "--workers", "1"]
    assert main([*command, "--methods", "chain-3", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("(an edge)") == 2
    assert "nan" not in shown
    command = ["map", "--task", "slow", "--ranks", "2", "--steps", "30", "--seeds", "1", "--workers", "1"]
    assert main([*command, "--methods", "chain-3", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("a rate at an edge") == 1
    written = {path.stem: strict_json(path) for path in tmp_path.glob("*.json")}
    assert written["frontier-slow-30"]["rows"][1]["against"]["difference"]["low"] is None
    assert written["map-slow"]["places"][0]["difference"]["low"] is None
    (place,) = pay_map.read(tmp_path / "map-slow.json")
    assert math.isnan(place.difference.low)


def strict_json(path):
    """The content of a file without NaN and Infinity, which Python writes and other readers refuse."""
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {path.name}"))


def test_adafactors_arms_have_about_loras_bytes_and_an_absolute_rate():
    """At a width where its vectors weigh little."""
    own = {"lr": 1e-3, "seed": 0, "epochs": 1, "steps_per_epoch": 60, "targets": "all-linear"}
    sizes = {}
    for name in ("lora", "lora-adafactor", "chain-2-adafactor", "chain-4-adafactor", "b-adafactor"):
        model = nn.Sequential(nn.Linear(512, 512, bias=False))
        opt = families.FAMILIES[name].method(8).optimizer(model, **own)
        model(torch.ones(1, 512)).sum().backward()
        opt.step()
        sizes[name] = trained_bytes(opt)
        assert name == "lora" or opt.param_groups[0]["eps"] == (None, 1.0)
        opt.finish()
    assert all(0.9 < size / sizes["lora"] < 1.1 for size in sizes.values())
    assert sizes["b-adafactor"] < sizes["lora"]


def test_every_family_has_one_name_in_the_picture():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    test = t_interval((1.0, 1.1))
    figure, axes = pyplot.subplots()
    arms = families.arms([2], families.FAMILIES)
    points(axes, [types.SimpleNamespace(arm=arm, state_bytes=1024, test=test) for arm in arms], "nats")
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    pyplot.close(figure)
    assert len(names) == len(set(names)) == len(families.FAMILIES)  # full fine-tuning; random A at r and 2r is one
    assert not [name for name in names if "{" in name or "·" in name]
    looks = {family.name: (family.look[0], family.look[2]) for family in families.FAMILIES.values()}
    assert len(set(looks.values())) == len(looks)


def test_the_map_from_end_to_end(quick, tmp_path, capsys):
    command = ["map", "--task", "slow", "--ranks", "2", "--steps", "20", "30", "--workers", "1"]
    command += ["--seeds", "2", "--methods", "lora", "b-selected"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    places = json.loads((tmp_path / "map-slow.json").read_text())["places"]
    assert [(place["rank"], place["steps"]) for place in places] == [(2, 20), (2, 30)]
    assert (tmp_path / "map-slow.md").read_text().strip() in capsys.readouterr().out
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--out", str(tmp_path / "other"), "--so-far"]) == 1
    assert "no cell is complete yet" in capsys.readouterr().err
    assert main(["map", "--task", "slow", "--ranks", "2", "--steps", "30", "5", "--out", str(tmp_path / "third")]) == 2
    assert "a link needs at least one step" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frontier", "--task", "shakespeare"], "--task shakespeare needs --corpus and --model"),
        (["frontier", "--task", "slow", "--model", "x"], "makes its own model and data: leave out --model"),
        (["frontier", "--task", "slow", "--seeds", "0"], "argument --seeds: 0"),
        (["frontier", "--task", "slow", "--ranks", "0"], "argument --ranks: 0"),
        (["frontier", "--task", "slow", "--ranks", "50"], "r=150 is above the rank of layer"),
        (["frontier", "--task", "slow", "--ranks", "50", "--no-gate", "--methods", "b-random-2"], "or --methods\n"),
        (["frontier", "--task", "code", "--model", "no/such"], "offline the hub is not asked, and no copy is cached"),
        (["map", "--task", "slow", "--ranks", "0"], "argument --ranks: 0"),
        (["frontier", "--task", "slow", "--ranks", "50"], "--methods, or --no-gate\n"),
        (["frontier", "--task", "demo", "--steps", "300000"], "--steps 300000: the text ends after "),
        (["map", "--task", "demo", "--steps", "300000"], "--steps 300000: the text ends after "),
        (["map", "--task", "slow", "--steps", "5"], "a link needs at least one step"),
        (["map", "--task", "slow", "--methods", "lora"], "the map compares chains with LoRA, so give one of chain-2, "),
        (["map", "--task", "slow", "--methods", "chain-3", "galore"], "so leave out galore (frontier takes it)"),
        (["map", "--task", "slow", "--methods", "chain-3", "b-adafactor"], "so leave out b-adafactor (frontier takes"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_galore_trains_the_targets_alone():
    pytest.importorskip("galore_torch")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = [p.clone() for p in model.parameters()]
    optimizer = Method("galore", ranks=(2,)).optimizer(
        model, lr=0.1, seed=0, epochs=1, steps_per_epoch=9, targets=["0"]
    )
    model(torch.randn(4, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    assert [not torch.equal(p, old) for p, old in zip(model.parameters(), before)] == [True, False, False, False]
    # weight, gradient, two moments of 2×8, projector of 8×2
    assert trained_bytes(optimizer) == 4 * (64 + 64 + 3 * 16)


@pytest.mark.parametrize(("kind", "magnitudes"), [("peft", 0), ("dora", 8)])
def test_pefts_adapters_are_drawn_by_the_seed_and_merged_at_the_end(kind, magnitudes):
    pytest.importorskip("peft")
    drawn = []
    for seed in (0, 0, 1):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        state = torch.get_rng_state()
        method = Method(kind, ranks=(2,), alpha=2)
        optimizer = method.optimizer(model, lr=0.1, seed=seed, epochs=1, steps_per_epoch=9, targets=["0"])
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(model[0].lora_A["default"].weight.clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    optimizer.step()
    # weight, gradient and two moments of A, B and the rows' norms; AdamW's count of steps for each
    assert trained_bytes(optimizer) == 4 * (4 * (2 * 16 + magnitudes) + 2 + bool(magnitudes))
    trained = model(x).detach()
    optimizer.finish()
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(model(x), trained)
