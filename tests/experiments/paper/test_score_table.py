"""Tables of scores: what is compared, what is missing, and every format saying the same."""

import csv
import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from experiments.paper.score_table import Column, Entry, Row, Table
from experiments.report.stats import holm

LORA, COLA, FULL = {0: 50.0, 1: 52.0, 2: 51.0}, {0: 53.0, 1: 55.0, 2: 54.5}, {0: 49.0, 1: math.nan}


def table(**changes):
    given = {
        "title": "Toy",
        "columns": (Column("wsc", "WSC"), Column("cb", "CB"), Column("flops", "FLOPs", ".3g", None)),
        "rows": (Row("lora", "LoRA"), Row("cola", "COLA", "lora"), Row("full", "Full", "lora")),
        "entries": {
            ("lora", "wsc"): Entry(LORA, 56.53, 7.67),
            ("cola", "wsc"): Entry(COLA, 59.81, 4.1),
            ("full", "wsc"): Entry(FULL, 60.0),
            ("lora", "cb"): Entry({0: 70.0, 1: 71.0, 2: 75.0}, 75.35),
            ("cola", "cb"): Entry({}, 76.42),
            ("cola", "flops"): Entry({0: 3e9, 1: 3e9, 2: 3e9}, 3.6e11),
        },
        "seeds": (0, 1, 2),
        "notes": ("A note.",),
    }
    return Table(**{**given, **changes})


def test_the_table_in_a_terminal():
    assert (
        table().text()
        == """Toy

                  WSC            CB    FLOPs
--------------------------------------------
LoRA     51.00 ± 1.00  72.00 ± 2.65
  paper  56.53 ± 7.67         75.35
COLA     54.17 ± 1.04             –    3e+09
  paper  59.81 ± 4.10         76.42  3.6e+11
Full      49.00 (1/3)
  paper         60.00

Paired by seed; two-sided t test, 95 % t interval, p also after Holm's correction over all lines.
                      difference   95 % interval       p  p (Holm)  seeds  paper's
-------------------------------------------------------------------------------------------
WSC  COLA minus LoRA       +3.17  +2.45 to +3.88  0.0028    0.0028      3    +3.28   better
WSC  Full minus LoRA       -1.00               –       –         –      1    +3.47  no test

A note.

Not complete (–, or fewer seeds in brackets): Full, WSC: seed 2 missing; Full, WSC: seed 1 diverged; """
        + ("COLA, CB: seeds 0, 1, 2 missing.")
    )


def test_what_is_missing_is_named_and_not_made_up():
    assert table().missing() == [
        "Full, WSC: seed 2 missing",
        "Full, WSC: seed 1 diverged",
        "COLA, CB: seeds 0, 1, 2 missing",
    ]
    record = next(r for r in table().records() if (r["row"], r["column"]) == ("cola", "cb"))
    assert {name: record[name] for name in ("mean", "std", "n", "difference", "p", "minus_paper")} == dict.fromkeys(
        ("mean", "std", "difference", "p", "minus_paper")
    ) | {"n": 0}
    empty = Table("t", (Column("a", "A"),), (Row("x", "X"),), {("x", "a"): Entry()}, (0,))
    assert empty.missing() == ["X, A: seed 0 missing"]
    assert "X  –" in empty.text()
    assert empty.comparisons() == []


def test_whole_tables_miss_nothing():
    whole = table(entries={("lora", "wsc"): Entry(LORA), ("cola", "wsc"): Entry(COLA)})
    assert whole.missing() == []
    assert "Not complete" not in whole.text() + whole.markdown() + whole.latex()


def test_pairs_are_of_the_same_seeds_only():
    """In another order, with a seed each that the other lacks."""
    lora, cola = {3: 1.0, 0: 5.0, 1: 2.0, 2: 4.5}, {1: 2.5, 2: 5.5, 0: 5.75, 7: 100.0}
    compared = table(
        rows=(Row("lora", "LoRA"), Row("cola", "COLA", "lora")),
        entries={("lora", "wsc"): Entry(lora), ("cola", "wsc"): Entry(cola)},
        seeds=(0, 1, 2, 3),
    ).comparisons()
    expected = scipy_stats.ttest_rel([5.75, 2.5, 5.5], [5.0, 2.0, 4.5])
    assert [found.seeds for found in compared] == [(0, 1, 2)]
    assert compared[0].found.p == pytest.approx(expected.pvalue, rel=1e-9)
    limits = expected.confidence_interval()
    difference = compared[0].found.difference
    assert (difference.low, difference.high) == pytest.approx((limits.low, limits.high), rel=1e-9)


def test_holms_family_is_the_whole_table():
    entries = {}
    for column in ("wsc", "cb"):
        entries |= {("lora", column): Entry(LORA), ("cola", column): Entry(COLA)}
        entries |= {("full", column): Entry({0: 51.0, 1: 52.5, 2: 50.0})}
    compared = table(entries=entries).comparisons()
    assert len(compared) == 4
    assert [found.found.p_holm for found in compared] == holm([found.found.p for found in compared])
    assert {found.verdict for found in compared if found.row.key == "cola"} == {"better"}
    assert {found.verdict for found in compared if found.row.key == "full"} == {"no evidence"}


def test_a_difference_that_does_not_vary_is_not_tested():
    """Sixths of a hundred: the differences are equal but for rounding, which a t test would find overwhelming."""
    lora, cola = {0: 100 / 6, 1: 200 / 6, 2: 500 / 6}, {0: 200 / 6, 1: 300 / 6, 2: 600 / 6}
    assert len({cola[seed] - lora[seed] for seed in lora}) > 1
    compared = table(entries={("lora", "wsc"): Entry(lora), ("cola", "wsc"): Entry(cola)}).comparisons()
    assert [found.verdict for found in compared] == ["no test"]
    assert math.isnan(compared[0].found.p_holm)


@pytest.mark.parametrize("higher, verdict, bold", [(True, "better", "54.17 ± 1.04"), (False, "worse", "51.00 ± 1.00")])
def test_which_way_is_better(higher, verdict, bold):
    compared = table(
        columns=(Column("wsc", "WSC", higher_is_better=higher),),
        rows=(Row("lora", "LoRA"), Row("cola", "COLA", "lora")),
        entries={("lora", "wsc"): Entry(LORA), ("cola", "wsc"): Entry(COLA)},
    )
    assert [found.verdict for found in compared.comparisons()] == [verdict]
    assert f"**{bold}**" in compared.markdown()
    assert compared.markdown().count("**") == 4  # the title's and this
    assert rf"\textbf{{{bold.replace('±', '$' + chr(92) + 'pm$')}}}" in compared.latex()


def test_a_best_among_equals_is_not_marked():
    equal = table(entries={("lora", "wsc"): Entry(LORA), ("cola", "wsc"): Entry(dict(LORA))})
    assert equal.markdown().count("**") == 2  # the title's


def test_costs_are_not_compared():
    compared = table(
        entries={("lora", "flops"): Entry({0: 1.0, 1: 2.0}), ("cola", "flops"): Entry({0: 3.0, 1: 5.0})}, seeds=(0, 1)
    )
    assert compared.comparisons() == []
    assert "**" not in compared.markdown().replace("**Toy**", "")


def test_many_columns_are_turned_on_a_terminal():
    columns = tuple(Column(f"task{i}", f"A task {i:04}") for i in range(12))
    entries = {(row, c.key): Entry({0: 50.0 + i}, 1.0) for i, c in enumerate(columns) for row in ("lora", "cola")}
    turned = table(columns=columns, entries=entries, rows=(Row("lora", "LoRA"), Row("cola", "COLA")), seeds=(0,)).text()
    assert max(map(len, turned.splitlines())) < 120
    assert turned.splitlines()[2].split() == ["LoRA", "paper", "COLA", "paper"]
    assert turned.splitlines()[6].split() == ["A", "task", "0002", "52.00", "1.00", "52.00", "1.00"]


scores = st.dictionaries(st.integers(0, 3), st.one_of(st.floats(0, 100), st.just(math.nan)), max_size=4)


@given(scores, scores, st.one_of(st.none(), st.floats(0, 100)))
def test_every_format_says_the_same(lora, cola, paper):
    made = table(
        entries={("lora", "wsc"): Entry(lora, paper), ("cola", "wsc"): Entry(cola)},
        rows=(Row("lora", "LoRA"), Row("cola", "COLA", "lora")),
        seeds=(0, 1, 2),
    )
    cells = json.loads(made.json(command="x"))["cells"]
    lines = list(csv.DictReader(io.StringIO(made.csv()), quoting=csv.QUOTE_NONNUMERIC))
    assert len(cells) == len(lines) == 2
    for cell, line, values in zip(cells, lines, (lora, cola)):
        for name in ("mean", "std", "difference", "low", "high", "p", "p_holm", "paper"):
            assert line[name] == ("" if cell[name] is None else cell[name]), name
        finite = [value for value in values.values() if math.isfinite(value)]
        assert cell["n"] == len(finite)
        if finite:
            assert cell["mean"] == pytest.approx(math.fsum(finite) / len(finite))
            assert f"{cell['mean']:.2f}" in made.text()
            assert f"{cell['mean']:.2f}" in made.latex()
        else:
            assert cell["mean"] is None
    assert bool(made.missing()) == any(
        seed not in values or not math.isfinite(values[seed]) for values in (lora, cola) for seed in (0, 1, 2)
    ) or any(math.isnan(value) for value in (*lora.values(), *cola.values()))


def test_the_files(tmp_path):
    paths = table().write(tmp_path / "new" / "table1", command="python -m experiments table 1")
    assert [path.name for path in paths] == [f"table1.{suffix}" for suffix in ("txt", "md", "csv", "tex", "json")]
    written = json.loads(paths[-1].read_text())
    assert written["command"] == "python -m experiments table 1"
    assert written["missing"] == table().missing()
    diverged = next(cell for cell in written["cells"] if (cell["row"], cell["column"]) == ("full", "wsc"))
    assert diverged["values"] == {"0": 49.0, "1": None}
    assert r"\label{tab:table1}" in paths[3].read_text()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"entries": {("lora", "nope"): Entry()}}, "'nope'"),
        ({"entries": {("nope", "wsc"): Entry()}}, "'nope'"),
        ({"rows": (Row("a", "A", "b"),), "entries": {}}, "refers to 'b'"),
        ({"rows": (Row("a", "A"), Row("a", "B")), "entries": {}}, "a key occurs twice"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        table(**changes)
