"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import theory

MODULES = [m.name for m in pkgutil.iter_modules(theory.__path__) if m.name not in ("llm_gap",)]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"theory.{name}")
    import numpy as np

    result = doctest.testmod(module, extraglobs={"np": np})
    assert result.failed == 0


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
