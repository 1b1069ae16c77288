"""The scripts a user would copy run as they stand. The snippets on the site's pages are run when it is built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cola import Chain

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "experiments" / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

SCRIPTS = {
    "plain_loop.py": [["tiny", "6"]],
    "trainer.py": [["tiny", "6"]],
    "sft_chat.py": [["tiny", "6"]],
    "sharded.py": [["ddp", "6"]],  # and fsdp2 below
}
RUNS = [(name, args) for name, several in SCRIPTS.items() for args in several]


def run(name, args, directory, processes=2):
    launcher = [sys.executable]
    if name == "sharded.py":
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, str(EXAMPLES / name), *args],
        cwd=directory,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)


@pytest.mark.long
@pytest.mark.parametrize(("name", "args"), RUNS, ids=lambda value: str(value))
def test_example(name, args, tmp_path):
    result = run(name, args, tmp_path)
    # gloo's threads may abort the interpreter on its way out, when all has been written
    aborted = "terminate called without an active exception" in result.stderr
    assert result.returncode == 0 or aborted, result.stderr[-3000:]
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert "Chain(" in result.stdout or "knot 1" in result.stdout


@pytest.mark.long
def test_the_sharded_example_goes_on_from_its_checkpoint(tmp_path):
    from safetensors.torch import load_file

    merged, links = [], []
    for resume in ([], ["checkpoint-4"]):
        result = run("sharded.py", ["fsdp2", "6", *resume], tmp_path)
        assert (tmp_path / "merged" / "model.safetensors").exists(), result.stderr[-3000:]
        merged.append(load_file(tmp_path / "merged" / "model.safetensors"))
        links.append([(link.index, link.step) for link in Chain.load(tmp_path / "chain")])
        shutil.rmtree(tmp_path / "merged")
    assert links[0] == links[1] == [(0, 2), (1, 4), (2, 6)]
    assert all(torch.equal(value, merged[1][name]) for name, value in merged[0].items())
