"""The README's Python blocks run, in order, as a reader would type them."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_it_is_short_and_has_code():
    assert len(README.splitlines()) <= 150
    assert BLOCKS


def test_python_blocks_run(tmp_path, monkeypatch):
    """`model` and `loader` stand for the reader's own; here they are a tiny OPT and 16 batches."""
    pytest.importorskip("transformers")
    from tests.models import tiny_opt

    monkeypatch.chdir(tmp_path)
    ids = torch.arange(24).view(2, 12) % 32
    names = {"make_model": tiny_opt, "model": tiny_opt(), "loader": [{"input_ids": ids, "labels": ids}] * 16}
    names["model"].save_pretrained("base")
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)


def test_examples_name_the_policy():
    """Everywhere a reader copies from, the policy is the keyword argument ``policy``."""
    root = Path(__file__).parent.parent
    places = "README.md", "docs/**/*.md", "cola/**/*.md", "cola/**/*.py", "theory/**/*.md", "experiments/examples/*.py"
    made = re.compile(r"(?:ChainOptimizer\(\s*[\w.]+|attach\(trainer),\s*[\w.()]+,\s*(?!policy=|\*)\w[^\n]*")
    found = {str(p): made.findall(p.read_text()) for place in places for p in root.glob(place)}
    assert {path: calls for path, calls in found.items() if calls} == {}
