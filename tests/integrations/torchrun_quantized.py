"""Run by torchrun: chains on quantised bases under DDP; each process writes what it has seen as JSON."""

import json
import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from cola import StepKnots
from tests.integrations.quantized_nets import chained, inputs, net


def run(kind, how, rank, n):
    """Losses of a run of 7 steps with 3 knots, and the first layer's output in the end."""
    model = net(kind)
    opt = chained(model, StepKnots(every=2), quantized=how)
    parallel = torch.nn.parallel.DistributedDataParallel(model) if n > 1 else model
    losses = []
    for step in range(7):
        opt.zero_grad()
        x = inputs(step)[rank::n]
        loss = (parallel(x) - x[:, :3]).square().mean()
        loss.backward()
        opt.step()
        loss = loss.detach()
        if n > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / n)
    opt.finish()
    return {"losses": losses, "links": len(opt.chain), "output": model.first(inputs(0)).tolist()}


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    seen = {
        f"{kind}, {how}": run(kind, how, rank, n) for kind in ("nf4 double", "int8") for how in ("stack", "requantize")
    }
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort the interpreter on its way out
