"""What all tests share: quiet, offline, and no dependence on the clock or on other tests."""

import os

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No deadline: the machines that run this differ in speed. Derandomised: a failure is the same everywhere.
settings.register_profile("tests", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tests")


@pytest.fixture
def restored_rng():
    """Leaves torch's global generator as it was, for tests that must seed it."""
    import torch

    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
