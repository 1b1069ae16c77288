"""The house rules: imports point downward, importing is light and has no side effects, docs run."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: lower floors first; a module may import from its own floor's left and from lower floors, never upwards
FLOORS = [
    ["cola.common", "cola.knot", "cola.lora", "cola.chain", "cola.wrapper", "cola.checkpoint"],  # docstrings alone
    ["cola.common.version", "cola.common.contexts", "cola.common.arguments", "cola.common.interrupts"],
    ["cola.common.distributed", "cola.policies"],
    ["cola.knot.rounding", "cola.knot.tie", "cola.knot.sharded", "cola.knot.transport", "cola.knot.reset"],
    [
        "cola.lora.init",
        "cola.lora.per_layer",
        "cola.lora.peft_options",
        "cola.lora.config",
        "cola.lora.layer",
        "cola.lora.conv1d",
        "cola.lora.selected",
    ],
    ["cola.lora.quantized_codes", "cola.lora.stacked", "cola.lora.quantized", "cola.lora.kinds", "cola.lora.peft"],
    ["cola.lora.names", "cola.lora.defaults", "cola.lora.targets", "cola.lora.link"],
    ["cola.lora.trainable", "cola.lora.unsaved", "cola.lora.start", "cola.lora.live"],
    ["cola.lora.coverage", "cola.lora.integrity", "cola.lora.untrained"],
    ["cola.chain.architecture", "cola.chain.fingerprint", "cola.chain.replay", "cola.chain.spectrum"],
    ["cola.chain.plot", "cola.chain.summary"],
    ["cola.chain.files", "cola.chain.packing", "cola.chain.tensorfile", "cola.chain.on_disk"],
    ["cola.chain.peft_targets", "cola.chain.peft_export", "cola.chain.peft_import", "cola.chain.chain"],
    [
        "cola.wrapper.frameworks",
        "cola.wrapper.real_steps",
        "cola.wrapper.loss_meter",
        "cola.wrapper.wrapper",
        "cola.wrapper.link_groups",
    ],
    ["cola.knot.transaction", "cola.knot.merged", "cola.knot.log"],
    ["cola.checkpoint.base_model", "cola.checkpoint.state", "cola.checkpoint.directory", "cola.checkpoint.state_dict"],
    ["cola.checkpoint.restore", "cola.checkpoint.untied_link", "cola.checkpoint.resumable"],
    ["cola.optimizer", "cola.knot.learning_rate", "cola"],
    ["cola.integrations", "cola.integrations.checkpoints", "cola.integrations.references"],
    ["cola.integrations.settings", "cola.integrations.transformers", "cola.integrations.lightning"],
    ["cola.chain.hub", "cola.cli"],
]
ORDER = {name: i for i, name in enumerate(name for floor in FLOORS for name in floor)}


def modules(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path):
    """Absolute names imported anywhere in a file, at import time or later."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in ORDER else node.module


@pytest.mark.parametrize(("name", "path"), [pytest.param(n, p, id=n) for n, p in modules("cola")])
def test_imports_point_downward(name, path):
    assert name in ORDER, f"{name} has no floor in FLOORS: say where it belongs"
    for imported in imports(path):
        top = imported.split(".")[0]
        assert top not in ("theory", "experiments"), f"{name} imports {imported}"
        if top == "cola":
            assert ORDER[imported] < ORDER[name], f"{name} imports {imported}, which is above it"


@pytest.mark.parametrize(("name", "path"), [pytest.param(n, p, id=n) for n, p in modules("theory")])
def test_theory_stands_alone(name, path):
    if name in LLM:
        return
    assert not {i.split(".")[0] for i in imports(path)} & {"cola", "experiments"}


#: the rooms of theory, lowest first; each imports from itself and from those before it
ROOMS = [
    "arguments",
    "command_line",
    "seeds",
    "style",
    "theorem",
    "iterates",
    "oracles",
    "problems",
    "torch_backend",
    "step_sizes",
]
ROOMS += ["gradient_estimators", "frank_wolfe", "checks", "suite", "bench", "fw_gap"]


@pytest.mark.parametrize(("name", "path"), [pytest.param(n, p, id=n) for n, p in modules("theory") if "." in n])
def test_theory_imports_downward(name, path):
    if name in LLM:
        return
    room = ROOMS.index(name.split(".")[1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "theory":
            rooms = {f"{node.module}.{alias.name}".split(".")[1] for alias in node.names}
            assert rooms <= set(ROOMS[: room + 1]), f"{name} imports from {rooms}"


#: what joins theory to cola, lowest first
PARTS = ["balls", "sketch", "snapshots", "decomposition", "probe", "dense", "chains", "plots", "kinds", "side_by_side"]
LLM = [
    "theory.real_run",
    *(f"theory.real_run.{part}" for part in PARTS),
    "theory.llm_gap",
    "theory.links",
]


@pytest.mark.parametrize("name", LLM)
def test_the_gap_of_a_real_run_imports_downward(name):
    found = set()
    for node in ast.walk(ast.parse(dict(modules("theory"))[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    assert found & set(LLM) <= set(LLM[: LLM.index(name)])


def test_what_joins_theory_to_cola_is_listed():
    assert set(LLM) == {name for name, _ in modules("theory") if name.startswith(("theory.real_run", "theory.l"))}


@pytest.mark.parametrize(("name", "path"), [pytest.param(n, p, id=n) for n, p in modules("experiments")])
def test_experiments_use_the_public_api_only(name, path):
    public = {"cola", "cola.integrations.transformers", "cola.integrations.lightning"}
    if name in ("experiments.bench.tie", "experiments.bench.compiled"):
        public.add("cola.knot.tie")  # a tie alone, without the checks of the knot around it
    assert {i for i in imports(path) if i.split(".")[0] == "cola"} <= public


def test_top_level_holds_what_was_agreed():
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    tracked_folders = {line.split("/")[0] for line in tracked if "/" in line and not line.startswith(".")}
    assert tracked_folders <= {"cola", "theory", "experiments", "tests", "docs"} or not tracked_folders
    assert {"cola", "theory", "experiments", "tests"} <= folders


def test_importing_cola_costs_no_more_than_a_few_modules_and_touches_nothing():
    """`import cola` stays within 1.1 times `import torch` because it loads next to nothing else."""
    code = """
import sys, os, random, torch
before, env, state = set(sys.modules), dict(os.environ), (random.getstate(), torch.get_rng_state().tolist())
threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
import cola
new = {m.split('.')[0] for m in set(sys.modules) - before}
heavy = {'transformers', 'peft', 'accelerate', 'scipy', 'matplotlib', 'datasets', 'safetensors', 'tqdm'}
assert not new & heavy, new & heavy
assert len(new - {'cola'}) <= 4, new
assert dict(os.environ) == env
assert (random.getstate(), torch.get_rng_state().tolist()) == state
assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", [n for package in ("cola", "theory") for n, _ in modules(package)])
def test_docstring_examples(name):
    if name == "cola.lora.conv1d" or name.startswith("cola.integrations."):
        pytest.importorskip("transformers")
    if name == "cola.integrations.lightning":
        pytest.importorskip("lightning")
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0


def test_no_pickle_is_read():
    for package in ("cola", "theory", "experiments"):
        for name, path in modules(package):
            text = path.read_text()
            assert not re.search(r"\bimport pickle\b|pickle\.loads?\(", text), name
            for call in re.findall(r"torch\.load\([^)]*\)", text):
                assert "weights_only=True" in call, (name, call)


def test_the_librarys_top_level_stays_small():
    entries = {p.name for p in (ROOT / "cola").iterdir() if p.name != "__pycache__"}
    assert len(entries) <= 12, sorted(entries)


def test_the_outline_of_the_house_is_true():
    """Every place that docs/architecture.md names is there, and every module of cola is in a place that it names."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    places = [re.findall(r"`([\w/.]+)`", place)[0] for place, _ in rows]
    for (_, about), place in zip(rows, places):
        assert (ROOT / place).exists(), place
        for name in re.findall(r"`([a-z_/]+)`", about) if place.endswith("/") else ():
            found = [ROOT / place / name, ROOT / place / f"{name}.py"]
            assert any(path.exists() for path in found), f"{place} has no {name}"
    for name, path in modules("cola"):
        relative = path.relative_to(ROOT).as_posix()
        assert any(relative.startswith(place) for place in places) or path.name == "__init__.py", name
