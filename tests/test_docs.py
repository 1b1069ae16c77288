"""The site covers the repository: public names, commands, sections of the results. `make docs` builds and runs it."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import cola
from cola import cli
from experiments.__main__ import COMMANDS

DOCS = Path(__file__).parent.parent / "docs"


def test_every_public_name_is_in_the_reference():
    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.rst"))
    documented = set(re.findall(r"^\.\. auto\w+:: (?:cola\.)?(\w+)$", text, re.MULTILINE))
    assert set(cola.__all__) - {"__version__"} <= documented


def test_every_command_is_in_the_reference(capsys):
    shown = set(re.findall(r"^```\{help\} (.*)$", (DOCS / "reference" / "command-line.md").read_text(), re.MULTILINE))
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = re.findall(r"^    (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert {"inspect", "verify", "merge"} <= set(commands)
    expected = {f"cola.cli {name}" for name in commands} | {f"experiments.__main__ {name}" for name in COMMANDS}
    assert expected | {"theory.fw_gap", "theory.llm_gap", "theory.links"} <= shown


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_cells_call_commands_so_that_a_failure_is_seen(page):
    """IPython goes on after a failed ``!command``; ``%%bash`` raises."""
    for cell in re.findall(r"```\{code-cell\}.*?```", page.read_text(), re.DOTALL):
        assert not re.search(r"^\s*!", cell, re.MULTILINE), cell


@pytest.fixture
def extension(monkeypatch):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    return importlib.import_module


def test_every_section_of_the_results_has_a_page(extension):
    repository = extension("repository")
    text = (DOCS.parent / "experiments" / "RESULTS.md").read_text()
    for title in repository.titles(text):
        assert repository.result_page(repository.make_id(title)).startswith("results/")


@pytest.mark.parametrize("name", ["repository", "command_help"])
def test_examples_of_the_extensions(extension, name):
    assert doctest.testmod(extension(name)).failed == 0
