"""Training runs as one process of a group sees them: started by torchrun in test_distributed.py, writes what it saw.

Usage: torchrun --nproc-per-node N -m tests.integrations.torchrun_chain KIND OUT [options] [and KIND OUT [options]] …
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from cola import ChainOptimizer, GapKnots, LinkConfig, PlateauKnots, StepKnots, log_to
from tests.kinds import Mixed
from tests.models import BODY, Net, batch

ROWS = 8
SELECTED = {"train": "B", "init": "selector"}


def main():
    dist.init_process_group("gloo")
    for last, words in itertools.groupby(sys.argv[1:], lambda word: word == "and"):
        if not last:
            run(list(words))
    # All is written. Gloo's threads may outlive the interpreter's teardown, which then aborts ("terminate called
    # without an active exception", one run in ten): leave without one.
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["ddp", "fsdp2"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--knots", default="2,4,6")
    parser.add_argument("--plateau", action="store_true")
    parser.add_argument("--ranks", default="4")
    parser.add_argument("--selected", action="store_true", help="train B alone on selected inputs, tie by gain")
    parser.add_argument("--mixed", action="store_true", help="a model of all kinds of layers")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--dcp", choices=["nested", "flat"], help="save in shards, with the chain beside the state")
    args = parser.parse_args(words)
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Mixed() if args.mixed else Net(dtype=getattr(torch, args.dtype))
    policy = StepKnots(at=[int(k) for k in args.knots.split(",")])
    if args.plateau:
        policy = PlateauKnots(patience=0, window=2, threshold=0.2)
    if args.selected:
        policy = GapKnots(share=0.9, window=2)
    ranks = tuple(int(r) for r in args.ranks.split(","))
    own = SELECTED if args.selected else {}
    targets = "all" if args.mixed else BODY
    link = LinkConfig(r=ranks, lora_alpha=4, target_modules=targets, dtype=getattr(torch, args.dtype), **own)
    reset = "transport" if args.selected else "state"
    opt = ChainOptimizer(torch.optim.AdamW, model, policy, link=link, reset=reset, lr=0.02)
    told = []
    opt.on_knot(log_to(lambda numbers, step: told.append(step)))
    called = wrap(args.kind, model)
    parameters = trained_parameters(opt)
    start = 0
    if args.resume:
        start = load(args.resume, model, opt) if args.dcp is None else load_shards(args.resume, model, opt, args.dcp)
    share = ROWS // world
    losses = []
    for step in range(start, args.steps):
        if step == args.die_at and rank == world - 1:
            raise SystemExit(17)
        opt.zero_grad()
        x, y = batch(step, n=ROWS, dtype=model.head.weight.dtype)
        mine = slice(rank * share, (rank + 1) * share)
        loss = (called(x[mine]) - y[mine]).square().mean()
        loss.backward()
        opt.observe(loss)
        opt.step()
        mean = loss.detach().float()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
        if args.save and step + 1 in (3, 4):
            directory = args.save / f"{step + 1}"
            if args.dcp is None:
                save(directory, model, opt, rank)
            else:
                dcp.save(shards(model, opt, args.dcp), checkpoint_id=directory)
    drawn = {path: [factor.A.tolist(), factor.B.tolist()] for path, factor in opt.live.snapshot().items()}
    lost = [entry.report.lost_norm for entry in opt.chain]
    norms = [entry.report.delta_norm for entry in opt.chain]
    opt.finish()
    after = called(batch(0)[0].to(model.head.weight.dtype)).float()
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    seen = {
        "rank": rank, "steps": [entry.step for entry in opt.chain], "losses": losses, "norms": norms, "lost": lost,
        "links": [entry.rank for entry in opt.chain], "drawn": drawn, "after": after.tolist(),
        "base": opt.chain.base and opt.chain.base.to_json(),
        "weights": {name: value.float().tolist() for name, value in weights.items()},
        "shares": [report.share for report in opt.reports], "told": len(told), "parameters": parameters,
        "missing": opt.chain.missing, "deltas": {} if opt.chain.missing else deltas(opt.chain),
    }  # fmt: skip
    args.out.mkdir(exist_ok=True, parents=True)
    (args.out / f"{rank}.json").write_text(json.dumps(seen))


def trained_parameters(opt):
    """What is printed about them."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        opt.print_trainable_parameters()
    return printed.getvalue()


def deltas(chain):
    """What all links together add to each layer."""
    return {layer: chain.delta(layer).tolist() for layer in chain.layers()}


def wrap(kind, model):
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def save(directory, model, opt, rank):
    """Whole states from whatever sharding, written by process 0 in the place of the former ones."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = {
        "model": get_model_state_dict(model, options=options),
        "opt": get_optimizer_state_dict(model, opt, options=options),
        "step": opt.steps,
    }
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(states, directory / "state.tmp")
        (directory / "state.tmp").rename(directory / "state.pt")
    dist.barrier()


def load(directory, model, opt):
    states = torch.load(directory / "state.pt", weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, states["model"], options=options)
    set_optimizer_state_dict(model, opt, states["opt"], options=options)
    return states["step"]


def shards(model, opt, form):
    """What torch.distributed.checkpoint saves, each process its part, and loads into; the chain is one entry more."""
    options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, opt, options=options),
        "chain": opt.chain,
    }


def load_shards(directory, model, opt, form):
    states = shards(model, opt, form)
    dcp.load(states, checkpoint_id=directory)
    options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
    set_model_state_dict(model, states["model"])
    set_optimizer_state_dict(model, opt, states["optimizer"], options=options)
    return opt.steps


if __name__ == "__main__":
    main()
