"""The example of the README runs, and its pictures exist."""

import re
from pathlib import Path

import theory


def test_readme_example_runs(capsys):
    text = (Path(theory.__file__).parent / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.S)
    exec(example.group(1), {})
    assert "FAIL" not in capsys.readouterr().out


def test_readme_pictures_are_there_and_small():
    folder = Path(theory.__file__).parent
    names = re.findall(r"\]\((figures/[^)]+)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert len(names) == 2
    assert all((folder / name).stat().st_size < 150_000 for name in names)
