"""DeepSpeed ZeRO keeps copies of the parameters and would undo every knot: each way into it ends in a clear error."""

import json
import os
import re
import socket
import sys

import pytest

pytest.importorskip("deepspeed")

from tests.launch import ROOT, launch

MOMENT = r"KnotError: param_groups do not hold lora_A of layer 'first'.*DeepSpeed ZeRO does: use DDP or FSDP2"
MODEL = r"ValueError: model: DeepSpeed ZeRO keeps its own flat copy .* use DDP, or FSDP2"
EXPECTED = {
    "initialize, stage 1": MOMENT,
    "initialize, stage 2": MOMENT,
    "initialize, stage 3": MOMENT,
    "engine": MODEL,
    "zero.Init": MODEL,
    "Accelerate": MOMENT,
    "Trainer": r"ValueError: the trainer uses DeepSpeed, .* use DDP or FSDP2",
}


def group():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    paths = os.pathsep.join([str(ROOT), *sys.path])
    return {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths,
    }  # fmt: skip


@pytest.mark.long
def test_every_way_into_deepspeed_is_refused_before_a_step_is_taken(tmp_path):
    result = launch("tests.integrations.deepspeed_runs", tmp_path, processes=0, **group())
    seen = json.loads(next(line for line in reversed(result.stdout.splitlines()) if line.startswith("{")))
    assert seen.keys() == EXPECTED.keys()
    for way, message in EXPECTED.items():
        assert re.match(message, seen[way]), (way, seen[way])
