"""The figures: three files each, the same bytes for the same table, gaps where something is missing."""

import json

import pytest

pytest.importorskip("matplotlib")

from experiments.paper import figures
from experiments.paper.score_table import Column, Entry, Row, Table


def lengths(missing=False):
    rows = tuple(Row(f"length {n}", f"{n}", None if n == 1 else "length 1") for n in (1, 2, 3))
    columns = tuple(Column(key, key.upper()) for key in ("wsc", "squad", "rte", "cb"))
    entries = {
        (row.key, column.key): Entry({0: 60.0 + i, 1: 62.0 + j}, 61.0 if j else None, 1.5)
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    }
    if missing:
        entries["length 2", "squad"] = Entry({}, 60.0)
        entries["length 3", "wsc"] = Entry({0: 50.0})
        entries |= {(row.key, "cb"): Entry() for row in rows}
    return Table("Chain length", columns, rows, entries, (0, 1))


def steps(missing=False):
    rows = (Row("LoRA", "LoRA"), *(Row(f"COLA(8,{r})", f"8,{r}", "LoRA") for r in (8, 6, 4)))
    columns = (Column("cb", "CB"), Column("cb:flops", "FLOPs saved", ".2e", None))
    entries = {(row.key, "cb"): Entry({0: 70.0 + i, 1: 71.0}, 75.0 + i) for i, row in enumerate(rows)}
    entries |= {(f"COLA(8,{r})", "cb:flops"): Entry({0: 1e9 * (8 - r)}, 3e9) for r in (6, 4)}
    if missing:
        entries["LoRA", "cb"] = Entry()
        entries["COLA(8,4)", "cb"] = Entry({0: 70.0})
    return Table("Step-down", columns, rows, entries, (0, 1))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("draw, make", [(figures.chain_lengths, lengths), (figures.rank_step_down, steps)])
def test_three_files_and_the_same_each_time(draw, make, missing, tmp_path):
    first = draw(make(missing), tmp_path / "a" / "figure")
    assert [path.name for path in first] == ["figure.png", "figure.pdf", "figure.json"]
    assert first[0].read_bytes().startswith(b"\x89PNG")
    assert first[1].read_bytes().startswith(b"%PDF")
    if missing:
        return
    second = draw(make(missing), tmp_path / "b" / "figure")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_data_beside_the_figure_is_the_tables(tmp_path):
    table = lengths(missing=True)
    written = json.loads(figures.chain_lengths(table, tmp_path / "f")[2].read_text())
    assert written["missing"] == table.missing() != []
    assert [point["mean"] for point in written["panels"]["squad"]] == [(60 + 63) / 2, None, (62 + 63) / 2]
    assert written["panels"]["rte"][0] == {
        "row": "length 1", "mean": 62.0, "std": pytest.approx(8**0.5), "n": 2, "paper": 61.0, "paper_std": 1.5,
    }  # fmt: skip


def test_powers_of_ten():
    assert figures._short(3.6e11) == "3.6·10¹¹"
    assert figures._short(9.96e9) == "1.0·10¹⁰"
