"""What docs/explanation/reproducibility.md promises has a test each; those that have no better place are here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cola import LinkConfig
from cola.lora.init import INITS
from tests.cola.chain.stored import trained
from tests.models import draw

pytestmark = pytest.mark.numerics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "reproducibility.md").read_text()
PROMISES = re.findall(r"^\| (.+) \| (.+) \| `(tests/[\w/]+\.py)::(\w+)` \|$", PAGE, re.MULTILINE)


def factors(init):
    return draw(LinkConfig(r=7, init=init), (40, 300), seed=3, link=1, layer="a.b")[0]


def test_every_promise_names_a_condition_and_a_test_that_exists():
    rows = re.findall(r"^\| .*`tests/.*$", PAGE, re.MULTILINE)
    assert len(PROMISES) == len(rows) > 10
    conditions = re.findall(r"^- \*\*(.+)\*\*:", PAGE, re.MULTILINE)
    for _, condition, path, name in PROMISES:
        assert condition.split(",")[0] in conditions
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name}"


PAGES = [ROOT / "README.md", ROOT / "cola/chain/FORMAT.md", ROOT / "theory/README.md", *ROOT.glob("docs/*/*.md")]
PROMISING = [
    path
    for path in PAGES
    if path.name != "reproducibility.md" and re.search(r"bit for bit|to the bit|same bits", path.read_text())
]


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in PROMISING])
def test_pages_that_promise_bits_say_where_the_conditions_stand(path):
    assert "reproducibility.md" in path.read_text()


def test_pages_that_promise_bits_are_found():
    assert {"FORMAT.md", "trainer.md", "save-and-serve.md"} <= {path.name for path in PROMISING}


@pytest.mark.parametrize("init", sorted(set(INITS) - {"orthogonal", "two-sided"}))  # LAPACK decomposes those
def test_equal_keys_give_equal_factors_for_any_number_of_threads(init):
    threads, drawn = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            drawn.append(factors(init))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


def test_other_kernels_draw_the_same_factors_up_to_rounding(tmp_path):
    """torch's normal draws take other logarithms and cosines with AVX2 than without."""
    code = """
import sys, torch
from tests.cola.test_reproducible import INITS, factors
from tests.models import draw
torch.save({init: factors(init) for init in INITS}, sys.argv[1])
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "drawn")], cwd=ROOT, env=environment, check=True)
    other, eps = torch.load(tmp_path / "drawn", weights_only=True), torch.finfo(torch.float32).eps
    for init in ("selector", "kaiming"):
        assert torch.equal(other[init], factors(init))
    # Box and Muller: a radius of at most sqrt(48 ln 2) < 6 for 24 random bits, times a cosine whose argument of up to
    # 2 pi is rounded; each of the functions errs by two units or less
    assert (other["gaussian"] - factors("gaussian")).abs().max() <= 6 * (2 * torch.pi + 4) * eps / 7
    # Q of a well-conditioned 300x7 matrix moves by its condition (at most 2 here) times the change of the draws
    change = 6 * (2 * torch.pi + 4) * eps * (300 * 7) ** 0.5 / 300**0.5
    assert (other["orthogonal"] - factors("orthogonal")).norm() <= 4 * change


def test_equal_links_are_equal_files(tmp_path):
    _, chain = trained()
    written = []
    for name in ("one", "two"):
        chain.save(tmp_path / name)
        written.append({p.name: p.read_bytes() for p in (tmp_path / name).glob("*.safetensors")})
    assert len(written[0]) == len(chain)
    assert written[0] == written[1]
