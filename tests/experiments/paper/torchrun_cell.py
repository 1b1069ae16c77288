"""``torchrun … -m tests.experiments.paper.torchrun_cell FOLDER CELL``: run a cell, sharded on CPUs if it says so."""

import json
import sys
from pathlib import Path

import accelerate
from accelerate.utils import DistributedType

from experiments.methods import Method
from experiments.paper import finetune
from experiments.paper.cells import Cell, name
from experiments.sweep import Sweep

if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    given["method"] = Method(**given["method"])
    cell, original = Cell(**given), finetune.training_arguments

    def on_cpus(*args):
        """Accelerate shards on accelerators only; in its sharding nothing else depends on what the device is."""
        arguments = original(*args)
        if cell.fsdp:
            assert str(arguments.device).startswith("cpu")  # reading it makes Accelerate's state
            accelerate.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return arguments

    finetune.training_arguments = on_cpus
    Sweep(Path(sys.argv[1]), finetune.run, name).carry_out(lambda done: [cell], workers=1, progress=False)
