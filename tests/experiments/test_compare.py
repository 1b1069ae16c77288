"""Choosing a rate looks at validation only; the test split is read once per chosen run, after all choices."""

import dataclasses

import pytest

from experiments import compare, report
from experiments.arms import ARMS
from experiments.compare import Plan, Run, choose
from experiments.train import Outcome, Setting


def outcome(arm="lora", lr=1e-3, seed=0, validation=1.0):
    return Outcome(arm, lr, seed, validation, (2.0, 1.0), (), 10, 0.5, 0.5)


@pytest.fixture
def plan(tmp_path):
    rates = {"lora": (1e-3, 2e-3), "cola-2": (1e-3, 2e-3), "full": (5e-4,)}
    return Plan(rates, (0,), (0, 1, 2), Setting(epochs=1), tmp_path, tmp_path)


def test_the_lowest_mean_validation_loss_chooses():
    outcomes = [
        outcome(lr=1e-3, seed=0, validation=1.0),
        outcome(lr=1e-3, seed=1, validation=1.4),
        outcome(lr=2e-3, seed=0, validation=1.1),
        outcome(lr=2e-3, seed=1, validation=1.1),
    ]
    assert choose(outcomes) == 2e-3
    assert choose(outcomes[:1] + outcomes[2:3]) == 1e-3
    assert choose([outcome(lr=2e-3), outcome(lr=1e-3)]) == 1e-3
    with pytest.raises(ValueError, match="no run to choose"):
        choose([])


def test_test_loss_is_read_after_all_choices_and_once_per_chosen_run(plan, monkeypatch):
    """Validation prefers the higher rate, the test split would prefer the lower: validation decides."""
    log = []

    def train(run, plan):
        log.append(("train", run))
        return outcome(run.arm, run.lr, run.seed, validation=-run.lr)

    def test(run, plan):
        log.append(("test", run))
        return run.lr

    monkeypatch.setattr(compare, "_train", train)
    monkeypatch.setattr(compare, "_test", test)
    monkeypatch.setattr(compare, "_rebuild", lambda run, plan: None)
    monkeypatch.setattr(compare, "_untouched", lambda plan: 3.0)
    ticks = []
    results = compare.compare(plan, ticks.append)
    assert results.chosen == {"lora": 2e-3, "cola-2": 2e-3, "full": 5e-4}
    kinds = [kind for kind, _ in log]
    assert kinds == ["train"] * plan.size() + ["test"] * 9
    assert len(ticks) == plan.size() == 2 + 2 + 2 + 2 + 3
    tested = [run for kind, run in log if kind == "test"]
    assert sorted(tested) == sorted(Run(arm, lr, seed) for arm, lr in results.chosen.items() for seed in (0, 1, 2))
    assert len({run for kind, run in log if kind == "train"}) == plan.size()
    assert results.losses("lora") == [2e-3] * 3


def test_a_search_uses_the_first_seeds_of_the_comparison(plan):
    with pytest.raises(ValueError, match="must be the first of seeds"):
        dataclasses.replace(plan, search_seeds=(7,))


def test_rates_near_the_recorded_one():
    arm = dataclasses.replace(ARMS["lora"], rates=(1.0, 2.0, 4.0, 8.0), recorded=2.0)
    assert arm.nearby(1) == (2.0,)
    assert arm.nearby(2) == (2.0, 4.0)
    assert arm.nearby(3) == (1.0, 2.0, 4.0)
    assert dataclasses.replace(arm, recorded=1.0).nearby(3) == (1.0, 2.0, 4.0)
    with pytest.raises(ValueError, match=r"recorded=3.0 is not among"):
        dataclasses.replace(arm, recorded=3.0)


@pytest.fixture
def results(plan):
    losses = {"lora": [2.0, 2.1, 2.2], "cola-2": [1.95, 2.04, 2.16], "full": [1.8, 1.91, 1.99]}
    chosen = {"lora": 1e-3, "cola-2": 2e-3, "full": 5e-4}
    runs = {Run(arm, chosen[arm], seed): loss for arm in losses for seed, loss in enumerate(losses[arm])}
    outcomes = {run: outcome(run.arm, run.lr, run.seed) for run in runs}
    return compare.Results(outcomes, chosen, runs, 3.0, {})


def test_the_table_compares_with_lora_and_measures_the_gap(results):
    lora, cola, full = rows = report.rows(results)
    assert lora.against is None
    assert (lora.gap, full.gap) == (0.0, 1.0)
    assert cola.gap == pytest.approx(0.05 / 0.2)
    assert cola.against.difference.mean == pytest.approx(-0.05)
    text = report.table(rows)
    assert "25 %" in text
    assert "-0.0500 [-0.0748, -0.0252]" in text
    first, second = report.statements(rows)
    assert first == "COLA, 2 links: 0.0500 bits per byte below LoRA, significant (p = 0.013)"
    assert second.startswith("full fine-tuning: 0.2000 bits per byte below LoRA, significant")


def test_checks_fail_when_there_is_nothing_to_learn_from_the_results(plan, results, monkeypatch):
    monkeypatch.setattr(report, "plan_steps", lambda plan: 2)

    def failed(results):
        return [check.what for check in report.checks(plan, results, report.rows(results)) if not check.holds]

    assert failed(results) == []
    assert failed(dataclasses.replace(results, untouched=1.99)) == ["every arm beats the untouched model"]
    swapped = {run: 4.1 - loss for run, loss in results.test.items()}
    assert failed(dataclasses.replace(results, test=swapped)) == [
        "full fine-tuning beats LoRA, so there is a gap to close"
    ]
    assert failed(dataclasses.replace(results, rebuilt={next(iter(results.test)): 0.1})) == [
        "saved chains rebuild the tuned weights"
    ]
    monkeypatch.setattr(report, "plan_steps", lambda plan: 3)
    assert failed(results) == ["every run took the same steps"]
