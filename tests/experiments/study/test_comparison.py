"""Only the development split chooses a rate; the test split is read once per chosen run, after all choices."""

import dataclasses

import pytest

from experiments.methods import Method
from experiments.study import control
from experiments.study.arms import Arm
from experiments.study.comparison import Plan, Results, rows
from experiments.study.setting import Setting
from experiments.study.table import demo_table


def outcome(dev=1.0, steps=2):
    losses = [2.0, 1.0, 0.5][:steps]
    return {
        "dev": dev,
        "dev_by_epoch": [dev],
        "losses": losses,
        "knots": [],
        "parameters": 10,
        "state_bytes": 2048,
        "seconds": 0.5,
        "cpu_seconds": 0.5,
    }


class Steps(Setting):
    """A setting of two steps, whatever the text."""

    def steps(self):
        return 2


@pytest.fixture
def plan():
    rates = {"lora": (1e-3, 2e-3), "cola-2": (1e-3, 2e-3), "full": (5e-4,)}
    return Plan({arm: control.arms()[arm] for arm in rates}, rates, (0,), (0, 1, 2), Steps(), test_untouched=True)


def carried_out(plan, validation, test):
    """A plan's cells, each done in the order in which it is wanted."""
    done, log = {}, []
    while new := [cell for cell in plan.wanted(done) if cell not in done]:
        cell = new[0]
        log.append(cell)
        done[cell] = outcome(validation(cell)) if cell.split == "dev" else {"test": test(cell), "rebuilt": None}
    return done, log


def test_test_loss_is_read_after_all_choices_and_once_per_chosen_run(plan):
    """Validation prefers the higher rate, the test split would prefer the lower: validation decides."""
    done, log = carried_out(plan, validation=lambda cell: -cell.lr, test=lambda cell: cell.lr)
    results = Results(plan, done)
    assert {arm: results.chosen(arm)[0].lr for arm in plan.arms} == {"lora": 2e-3, "cola-2": 2e-3, "full": 5e-4}
    kinds = [cell.split for cell in log]
    assert plan.size() == 2 + 2 + 2 + 2 + 3
    assert kinds == ["dev"] * plan.size() + ["test"] * 10
    assert log[-10:] == [*(run.tested for arm in plan.arms for run in results.chosen(arm)), plan.untouched]
    assert len(set(log)) == len(log) == len(done)
    assert results.losses("lora") == [2e-3] * 3
    assert log[0].method == Method("finetune")  # the longest first


def test_the_lowest_mean_validation_loss_chooses(plan):
    plan = dataclasses.replace(plan, search_seeds=(0, 1))
    losses = {(1e-3, 0): 1.0, (1e-3, 1): 1.4, (2e-3, 0): 1.1, (2e-3, 1): 1.1}
    done, _ = carried_out(plan, lambda cell: losses.get((cell.lr, cell.seed), 0.0), lambda cell: 0.0)
    assert Results(plan, done).chosen("lora")[0].lr == 2e-3
    done, log = carried_out(plan, lambda cell: 1.0, lambda cell: 0.0)
    assert Results(plan, done).chosen("lora")[0].lr == 1e-3  # the lower of two that tie
    assert len([cell for cell in log if cell.split == "dev"]) == plan.size()


def test_what_follows_a_run_waits_for_it():
    """Two rates, the other seed, the tests."""
    arm = Arm("LoRA", Method.lora(), (1.0, 2.0), 1.0)
    plan = Plan({"lora": arm}, {"lora": arm.rates}, (0,), (0, 1), Steps(), walk=True)
    done, order = {}, []
    while new := [cell for cell in plan.wanted(done) if cell not in done]:
        order.append([cell.split for cell in new])
        done.update({cell: outcome(cell.lr) if cell.split == "dev" else {"test": 0.0} for cell in new})
    assert order == [["dev"], ["dev"], ["dev"], ["test", "test"]]
    assert [(cell.lr, cell.seed) for cell in done if cell.split == "test"] == [(1.0, 0), (1.0, 1)]


@pytest.mark.parametrize("search_seeds", [(7,), ()])
def test_a_search_uses_the_first_seeds_of_the_comparison(plan, search_seeds):
    with pytest.raises(ValueError, match="must be the first of seeds"):
        dataclasses.replace(plan, search_seeds=search_seeds)


def test_a_search_begins_with_a_rate_of_the_grid():
    with pytest.raises(ValueError, match=r"start=3.0 is not among"):
        Arm("LoRA", Method.lora(), (1.0, 2.0, 4.0, 8.0), 3.0)


@pytest.fixture
def results(plan):
    losses = {"lora": [2.0, 2.1, 2.2], "cola-2": [1.95, 2.04, 2.16], "full": [1.8, 1.91, 1.99]}
    of = {plan.arms[arm].method: values for arm, values in losses.items()}
    done, _ = carried_out(plan, lambda cell: 1.0, lambda cell: of[cell.method][cell.seed] if cell.lr else 3.0)
    return Results(plan, done)


def test_the_table_compares_with_lora_and_measures_the_gap(results):
    lora, cola, full = found = rows(results)
    assert lora.against is None
    assert (lora.gap, full.gap) == (0.0, 1.0)
    assert cola.gap == pytest.approx(0.05 / 0.2)
    assert cola.against.difference.mean == pytest.approx(-0.05)
    text = demo_table(found)
    assert "25 %" in text
    assert "-0.0500 (-0.0748 to -0.0252)" in text
