"""The paper's tables as experiments: what would be run, and what becomes of outcomes that are made up here."""

import itertools
import math
from dataclasses import replace

import pytest

pytest.importorskip("transformers")

from experiments import tasks
from experiments.paper import tables
from experiments.paper.own_tables import LOW_RESOURCE, OWN_TABLES, PROMPTING
from experiments.paper.published import published
from experiments.paper.tables import FIGURES, TABLES, Setting, fill, searches
from experiments.sweep import gather

SEEDS = (0, 1, 2)
SETTING = Setting(model="tiny", seeds=SEEDS)


def outcome(cell):
    """A score that depends on all that matters, best at the second of LoRA's rates."""
    score = 60.0 + cell.seed + 5 * cell.method.links - 0.1 * sum(cell.method.ranks) - 1e3 * abs(cell.lr - 1e-4)
    return {"dev": score, "test": score - 1, "tokens_by_link": [300, 200, 100][: cell.method.links]}


def carried_out(table, setting, run=outcome):
    """Every cell that the table wants, as a sweep would run them."""
    return gather(run, [search.wanted for search in searches(table, setting).values()])


@pytest.mark.parametrize("number", range(1, 9))
def test_lines_and_tasks_are_the_papers(number):
    table = TABLES[number]
    assert [line.label for line in table.lines] == list(table.published.rows)
    assert table.tasks == table.published.columns
    labels = {line.label for line in table.lines}
    assert all(line.reference is None or line.reference in labels for line in table.lines)
    assert all(bool(line.rates) == line.method.trains for line in table.lines)


@pytest.mark.parametrize("number", range(1, 9))
def test_a_complete_table(number):
    done = carried_out(TABLES[number], SETTING)
    filled = fill(TABLES[number], SETTING, done, per_token=10)
    assert filled.missing() == []
    scores = [column for column in filled.columns if column.higher_is_better]
    assert [column.label for column in scores] == [tasks.task(name).name for name in TABLES[number].tasks]
    for row in filled.rows:
        for column in scores:
            entry = filled.entries[row.key, column.key]
            assert set(entry.values) == set(SEEDS)
            assert entry.paper == TABLES[number].published.score(row.key, column.key).mean
    # every rate of the grid on every seed, and nothing twice
    wanted = {
        (line.label, name): len(SEEDS) * max(1, len(line.rates))
        for line in TABLES[number].lines
        for name in TABLES[number].tasks
    }
    assert len(done) == sum(wanted.values())


def test_the_best_rate_on_the_development_score_is_tested():
    filled = fill(TABLES[1], SETTING, carried_out(TABLES[1], SETTING))
    entry = filled.entries["LoRA", "rte"]
    assert entry.note == "lr 0.0001"
    assert entry.values == {0: 60 + 5 - 0.8 - 1, 1: 61 + 5 - 0.8 - 1, 2: 62 + 5 - 0.8 - 1}


def test_a_run_that_diverged_is_neither_chosen_nor_hidden():
    def diverging(cell):
        return {"diverged": "the loss is nan"} if cell.lr == 1e-4 or cell.seed == 1 else outcome(cell)

    filled = fill(TABLES[7], SETTING, carried_out(TABLES[7], SETTING, diverging))
    # every rate has a seed that diverged, so each is as bad as another; the seed is named
    assert filled.missing() != []
    assert all("diverged" in phrase for phrase in filled.missing())

    def at_one_rate(cell):
        return {"diverged": "the loss is nan"} if cell.lr == 1e-4 else outcome(cell)

    filled = fill(TABLES[7], SETTING, carried_out(TABLES[7], SETTING, at_one_rate))
    assert filled.missing() == []
    assert filled.entries["LoRA", "wic"].note == "lr 5e-05"


def test_what_was_not_run_is_missing():
    def half(cell):
        return outcome(cell) if cell.task == "WIC" and cell.seed < 2 else None

    filled = fill(TABLES[7], SETTING, carried_out(TABLES[7], SETTING, half))
    assert len(filled.missing()) == len(TABLES[7].lines) * len(TABLES[7].tasks)
    assert all(entry.values == {} for entry in filled.entries.values())
    complete = fill(TABLES[7], replace(SETTING, tasks=("wic",), seeds=(0, 1)), carried_out(TABLES[7], SETTING, half))
    assert complete.missing() == []


def test_table_4_says_what_a_smaller_rank_saves():
    per = 10
    filled = fill(TABLES[4], SETTING, carried_out(TABLES[4], SETTING), per_token=per)
    for rank in (6, 4, 2):
        entry = filled.entries[f"COLA(8,{rank})", "cb:flops"]
        # the second link saw 200 of the made-up tokens
        assert set(entry.values.values()) == {(8 - rank) * 200 * per}
        assert entry.paper == published(4).score(f"COLA(8,{rank})", "cb").flops_saved
    assert ("COLA(8,8)", "cb:flops") not in filled.entries
    assert ("LoRA", "cb:flops") not in filled.entries
    without = fill(TABLES[4], SETTING, carried_out(TABLES[4], SETTING))
    assert without.entries["COLA(8,6)", "cb:flops"].mean is None
    assert "COLA(8,6), FLOPs saved: seeds 0, 1, 2 missing" in without.missing()


def test_the_papers_savings_are_proportional_to_what_is_left_of_the_rank():
    """To the three digits that it prints."""
    for task in ("cb", "wsc", "wic"):
        per_rank = [published(4).score(f"COLA(8,{r})", task).flops_saved / (8 - r) for r in (6, 4, 2)]
        # each was rounded to three significant digits, so by 0.5 in the third, at most one in 200
        assert max(per_rank) / min(per_rank) - 1 <= 2 * 0.005


@pytest.mark.parametrize(
    "number, label, expected",
    [
        (1, "COLA", {"name": "cola3-r8", "rates": 5, "train": 1000, "bias": True, "batch": 8}),
        (1, "Finetune", {"name": "finetune", "rates": 6, "train": 1000, "bias": False, "batch": 8}),
        (2, "COLA", {"name": "cola3-r8", "rates": 5, "train": 1000, "bias": False, "batch": 4}),
        (2, "Finetune", {"name": "finetune", "rates": 9, "train": 1000, "bias": False, "batch": 4}),
        (2, "ICL", {"name": "icl", "rates": 1, "train": 1000, "bias": False, "batch": 4}),
        (2, "0-shot", {"name": "zero-shot", "rates": 1, "train": 1000, "bias": False, "batch": 4}),
        (3, "length 1", {"name": "lora-r8", "rates": 5, "train": 1000, "bias": True, "batch": 8}),
        (3, "length 2", {"name": "cola2-r8", "rates": 5, "train": 1000, "bias": True, "batch": 8}),
        (4, "COLA(8,2)", {"name": "cola2-r8.2", "rates": 5, "train": 1000, "bias": True, "batch": 8}),
        (5, "COLA, SGD", {"name": "sgd-cola3-r8", "rates": 5, "train": 1000, "bias": True, "batch": 8}),
        (5, "LoRA, AdaGrad", {"name": "adagrad-lora-r8", "rates": 5, "train": 1000, "bias": True, "batch": 8}),
        (6, "LoRA, 50 samples", {"name": "lora-r8", "rates": 5, "train": 50, "bias": True, "batch": 8}),
        (7, "LoRA", {"name": "lora-r8", "rates": 5, "train": 5000, "bias": True, "batch": 8}),
        (8, "COLA, rank 64", {"name": "cola3-r64", "rates": 5, "train": 1000, "bias": True, "batch": 8}),
    ],
)
def test_an_entry_is_run_as_the_paper_does(number, label, expected):
    table = TABLES[number]
    search = searches(table, Setting())[label, table.tasks[0]]
    cell = search.cell(search.rates[0], 3)
    assert {
        "name": cell.method.name, "rates": len(search.rates), "train": cell.train, "bias": cell.bias,
        "batch": cell.batch,
    } == expected  # fmt: skip
    assert (cell.epochs, cell.seed, cell.test) == (5, 3, 50 if number == 6 else 1000)
    assert cell.model == ("meta-llama/Llama-2-7b-hf" if number == 2 else "facebook/opt-1.3b")
    assert search.search_seeds == search.seeds == (0, 1, 2, 3, 4)


def test_tables_share_their_runs():
    """Table 3's length 1 and Table 4's LoRA are Table 1's: a sweep runs them once."""
    one = set(carried_out(TABLES[1], SETTING))
    assert {cell for cell in carried_out(TABLES[3], SETTING) if cell.method.links != 2} <= one
    assert {cell for cell in carried_out(TABLES[4], SETTING) if cell.method.kind == "lora"} <= one


def test_figures_are_of_tables():
    assert FIGURES == {2: 3, 3: 4}


def test_a_part_of_a_table():
    setting = replace(SETTING, tasks=("CB", "sst-2", "cb"), labels=("COLA",), rates=2, train=10, test=5, epochs=3)
    found = searches(TABLES[1], setting)
    assert list(found) == [("COLA", "cb"), ("COLA", "sst2")]
    assert found["COLA", "cb"].rates == (8e-4, 1e-3)
    cell = found["COLA", "cb"].cell(1e-3, 0)
    assert (cell.train, cell.test, cell.epochs, cell.task) == (10, 5, 3, "CB")
    filled = fill(TABLES[1], setting, {})
    assert [row.reference for row in filled.rows] == [None]
    assert "The paper's numbers are those of OPT-1.3B." in filled.notes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": ("drop",)}, "Table 7 has wic, sst2, boolq"),
        ({"tasks": ("nope",)}, "nope"),
        ({"labels": ("Finetune",)}, "Table 7 has LoRA; COLA"),
        ({"rates": 0}, "rates=0"),
        ({"train": 0}, "train=0"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        searches(TABLES[7], replace(SETTING, **changes))


def test_nan_scores_are_missing():
    done = carried_out(TABLES[7], SETTING, lambda cell: {**outcome(cell), "test": math.nan})
    assert len(fill(TABLES[7], SETTING, done).missing()) == 6
    assert tables.LINKS == 3


@pytest.mark.parametrize("table", OWN_TABLES.values(), ids=OWN_TABLES)
def test_a_table_of_our_own_is_complete_and_shows_the_papers_scores(table):
    done = carried_out(table, SETTING)
    filled = fill(table, SETTING, done)
    assert filled.missing() == []
    assert [column.key for column in filled.columns] == list(table.tasks)
    assert filled.title == f"{table.title} (tiny)"
    for line in table.lines:
        for task in table.tasks:
            printed = table.published.score(line.printed or line.label, task)
            assert filled.entries[line.label, task].paper == (printed and printed.mean)


def test_prompting_has_all_tasks_and_the_papers_model():
    assert PROMPTING.tasks == tuple(tasks.key(name) for name in tasks.TASKS)
    filled = fill(PROMPTING, SETTING, carried_out(PROMPTING, SETTING))
    assert filled.entries["0-shot", "cb"].paper == 32.14
    assert filled.entries["ICL", "sst2"].paper is None


def test_low_resource_searches_by_the_same_rule_and_shows_table_6():
    for line in LOW_RESOURCE.lines:
        assert line.train == 100
        assert [high / low for low, high in itertools.pairwise(line.rates)] == [2.0] * (len(line.rates) - 1)
        assert line.start == line.rates[2:5]
    setting = replace(SETTING, search_seeds=(0,))
    first = searches(LOW_RESOURCE, setting)["LoRA", "cb"]
    assert [cell.lr for cell in first.wanted({})] == list(LOW_RESOURCE.lines[0].start)
    filled = fill(LOW_RESOURCE, setting, carried_out(LOW_RESOURCE, setting))
    assert filled.entries["LoRA", "cb"].paper == published(6).score("LoRA, 100 samples", "cb").mean
    assert filled.entries["full fine-tuning", "cb"].paper is None


@pytest.mark.parametrize("changes", [{"tasks": ("squad",)}, {"labels": ("ICL",)}])
def test_what_a_table_of_our_own_lacks_is_said(changes):
    with pytest.raises(ValueError, match="table low-resource has"):
        searches(LOW_RESOURCE, replace(SETTING, **changes))
