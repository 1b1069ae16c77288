"""The cells of the page on optimizers and oracles run, in order; their assertions are the page's statements."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "optimizers.md"


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_every_row_of_the_page_is_an_instance(capsys):
    text = PAGE.read_text(encoding="utf-8")
    cells = re.findall(r"```\{code-cell\} ipython3\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    for cell in cells:
        exec(compile(cell, PAGE.name, "exec"), names)
    assert "Muon" in capsys.readouterr().out
    # each oracle of the table's last column is made by a cell
    rows = re.findall(r"^\|.*\| `(\w+)` \|$", text, re.MULTILINE)
    assert len(rows) == 9
    assert all(f"{oracle}(" in "".join(cells) for oracle in rows)
