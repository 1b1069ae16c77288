"""The torch twin follows the NumPy run, on the CPU and on a GPU if there is one."""

import numpy as np
import pytest
import torch

from theory.checks import FAIL, audit
from theory.frank_wolfe import frank_wolfe
from theory.problems.recovery import observed_completion
from theory.torch_backend import on_torch

pytestmark = pytest.mark.numerics

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_run_follows_the_numpy_run(device, dtype):
    problem = observed_completion(60, 50, 900, dtype=dtype)
    here = frank_wolfe(problem, 40)
    there = frank_wolfe(on_torch(problem, device), 40)
    # rounding differences grow over forty steps, but stay far below those of a wrong formula
    close = 1e-9 if dtype == np.float64 else 1e-3
    assert there.value == pytest.approx(here.value, rel=close)
    assert there.gap == pytest.approx(here.gap, rel=close)
    assert there.final.dense() == pytest.approx(here.final.dense(), abs=close * np.abs(here.final.dense()).max())
    assert there.final.values.device.type == device


@pytest.mark.parametrize("device", DEVICES)
def test_every_check_holds_on_the_device(device):
    run = frank_wolfe(on_torch(observed_completion(60, 50, 900), device), 40)
    checks = audit(run)
    assert [c for c in checks if c.verdict == FAIL] == []
    assert {"gap = dense SVD", "gradient", "feasible"} <= {c.name for c in checks if c.verdict == "PASS"}


def test_unknown_device_is_named():
    with pytest.raises(ValueError, match="device must be one that torch can use here, got 'gpu7'"):
        on_torch(observed_completion(8, 8, 20), "gpu7")
