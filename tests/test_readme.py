"""The front pages: the README's block runs as pasted, links lead somewhere, and versions agree."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from cola import __version__

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_it_is_short_and_begins_with_a_picture():
    assert len(README.splitlines()) <= 100
    assert README.splitlines()[2].startswith("![")


def test_its_block_runs_as_pasted(tmp_path, monkeypatch, capsys, restored_rng):
    """In an empty folder, and nothing is given to it."""
    monkeypatch.chdir(tmp_path)
    (block,) = BLOCKS
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert len(re.findall(r"^knot \d", capsys.readouterr().out, re.MULTILINE)) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"merged.pt", "chain", "adapter"}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert targets
    assert not missing


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_examples_name_the_policy():
    """Everywhere a reader copies from, the policy is the keyword argument ``policy``."""
    places = "README.md", "docs/**/*.md", "cola/**/*.md", "cola/**/*.py", "theory/**/*.md", "experiments/examples/*.py"
    made = re.compile(r"(?:ChainOptimizer\(\s*[\w.]+|attach\(trainer),\s*[\w.()]+,\s*(?!policy=|\*)\w[^\n]*")
    found = {str(p): made.findall(p.read_text()) for place in places for p in ROOT.glob(place)}
    assert {path: calls for path, calls in found.items() if calls} == {}
