"""The wheel: what it holds, what it needs, and the README's block in an environment that has nothing else."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.test_house import ROOT, imports, modules

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name(requirement):
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


def test_requirements_are_what_the_library_imports():
    """Whatever else `cola` imports, it imports when it meets it, and an extra brings it."""
    found = {i.split(".")[0] for _, path in modules("cola") for i in imports(path)} - set(sys.stdlib_module_names)
    found = {name(module) for module in found}
    required = {name(r) for r in PROJECT["dependencies"]}
    assert required <= found
    extras = {name(r) for extra in PROJECT["optional-dependencies"].values() for r in extra}
    assert found - required - {"cola"} <= extras


def closure(requirements):
    """The installed distributions that some requirements need, without extras."""
    from packaging.requirements import Requirement

    found, left = {}, [Requirement(r) for r in requirements]
    while left:
        wanted = left.pop()
        if wanted.name.lower() not in found and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            found[wanted.name.lower()] = distribution = importlib.metadata.distribution(wanted.name)
            left += map(Requirement, distribution.requires or [])
    return list(found.values())


def bare():
    """The environment without a path on which pip or Python would find the clone."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, so that nothing is left in the clone and nothing left there gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for part in ("cola", "theory", "experiments", "tests"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(folder), str(source)], env=bare(), check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment with the wheel and what it requires: links to what is installed here."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    interpreter = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], env=bare(), check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in closure(PROJECT["dependencies"]):
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return interpreter


def run(python, *arguments, cwd):
    return subprocess.run([python, *arguments], cwd=cwd, env=bare(), capture_output=True, text=True, check=False)


@pytest.mark.long
def test_the_wheel_holds_the_library_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {"cola", f"chain_of_lora-{PROJECT['version']}.dist-info"}
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "cola").rglob("*.py")}
    assert files | {"cola/py.typed", "cola/chain/FORMAT.md"} == {n for n in names if n.startswith("cola/")}


BEFORE = """
import importlib.util

for absent in ("theory", "experiments", "tests", "scipy", "tqdm", "transformers", "peft", "accelerate", "matplotlib"):
    assert importlib.util.find_spec(absent) is None, absent
"""
AFTER = """
after, before = torch.load("merged.pt", weights_only=True), make_model().state_dict()
assert after.keys() == before.keys()
changed = {name for name in after if not torch.equal(after[name], before[name])}
assert changed == {"0.weight", "2.weight"}, changed
"""


@pytest.mark.long
def test_the_readmes_block_runs_with_the_wheel_and_its_requirements_alone(python, tmp_path):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    done = run(python, "-c", BEFORE + block + AFTER, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    command = Path(python).parent / "cola"
    shown = run(command, "inspect", "chain", "--no-plot", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "rank of Σ" in shown.stdout
