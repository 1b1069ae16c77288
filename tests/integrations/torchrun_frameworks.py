"""Runs of transformers' Trainer and of Accelerate as one process of a group: started by test_frameworks_distributed.py.

Usage: torchrun --nproc-per-node N -m tests.integrations.torchrun_frameworks KIND OUT [options] [and KIND OUT …] …
Without torchrun it is the one process that the others are compared with.

Accelerate shards on GPUs and their like alone, and on CPUs (``MULTI_CPU``) it silently trains by DDP (its state.py).
Nothing in its FSDP2 code needs a GPU, though: told of a group of the kind ``MULTI_GPU`` whose device is the CPU, all of
it, and of torch's, runs over gloo. That one word is what `sharding_on_cpus` changes.
"""

import argparse
import itertools
import json
import os
import sys
import warnings
from pathlib import Path

import accelerate
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from cola import ChainOptimizer, LinkConfig, PlateauKnots, StepKnots
from cola.integrations.transformers import attach
from tests.models import BODY, Net, batch, tiny_opt

KINDS = ["trainer-ddp", "trainer-fsdp2", "accelerate-ddp", "accelerate-fsdp2", "refused-fsdp"]
ROWS = 4
PLATEAU = {"patience": 1, "window": 1, "threshold": 0.01}
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def main():
    warnings.simplefilter("ignore")
    for last, words in itertools.groupby(sys.argv[1:], lambda word: word == "and"):
        if not last:
            run(list(words))
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(words):
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "kind", choices=["trainer-ddp", "trainer-fsdp2", "accelerate-ddp", "accelerate-fsdp2", "refused-fsdp"]
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--plateau", action="store_true")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--fsdp", type=json.loads, default={})
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--own-directories", action="store_true")
    parser.add_argument("--mixed", default="no")
    parser.add_argument("--ranks", default="2")
    args = parser.parse_args(words)
    fresh_state()
    framework, args.wrapper = args.kind.split("-")
    seen = {"trainer": train_by_trainer, "accelerate": train_by_accelerate, "refused": refusals}[framework](args)
    args.out.mkdir(exist_ok=True, parents=True)
    (args.out / f"seen-{RANK}.json").write_text(json.dumps(seen))
    if dist.is_initialized():
        dist.barrier()


def policy_of(args):
    return PlateauKnots(**PLATEAU) if args.plateau else StepKnots(at=[2, 4, 6])


def ranks_of(args):
    return tuple(int(r) for r in args.ranks.split(","))


def fresh_state():
    """Accelerate keeps its state in globals and in the environment."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            del os.environ[name]


def sharding_on_cpus():
    accelerate.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def described(opt, model, weights):
    return {
        "kind": type(next(model.parameters())).__name__,
        "steps": [link.step for link in opt.chain],
        "ranks": [link.rank for link in opt.chain],
        "missing": opt.chain.missing,
        "weights": {name: value.float().tolist() for name, value in weights.items() if "lm_head" not in name},
    }


# transformers' Trainer


def examples(n=16):
    ids = torch.arange(n * 8).view(n, 8) * 5 % 32
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(out, model=None, **changes):
    arguments = {
        "max_steps": 8, "per_device_train_batch_size": ROWS // WORLD, "learning_rate": 0.02, "save_steps": 3,
        "logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0,
        "per_device_eval_batch_size": ROWS // WORLD, **changes,
    }  # fmt: skip
    args = transformers.TrainingArguments(str(out), **arguments)
    assert str(args.device).startswith("cpu")  # reading it makes Accelerate's state
    if args.fsdp:
        sharding_on_cpus()
    return transformers.Trainer(model or tiny_opt(), args, train_dataset=examples(), eval_dataset=examples(4))


def train_by_trainer(args):
    changes = {"fsdp": True, "fsdp_config": {"version": 2, **args.fsdp}} if args.wrapper == "fsdp2" else {}
    if args.best:
        changes |= {
            "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2,
            "lr_scheduler_type": "constant",
        }  # fmt: skip
    trainer = trainer_of(args.out / f"of-{RANK}" if args.own_directories else args.out, **changes)
    if args.best:
        best_is_step(trainer, 4)
    opt = attach(trainer, torch.optim.AdamW, policy_of(args), link=LinkConfig(r=ranks_of(args), lora_alpha=2))
    trainer.train(resume_from_checkpoint=None if args.resume is None else str(args.resume))
    trainer.save_model(str(trainer.args.output_dir) + "/final")
    weights = trainer.accelerator.get_state_dict(trainer.model)
    return {
        **described(opt, trainer.model, weights),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "knots": [entry["step"] for entry in trainer.state.log_history if "knot" in entry],
        "best": trainer.state.best_model_checkpoint,
    }


def best_is_step(trainer, step):
    """As if evaluation had found the model of ``step`` the best."""
    decide = trainer._determine_best_metric
    trainer._determine_best_metric = lambda metrics, trial: decide(
        {**metrics, "eval_loss": abs(trainer.state.global_step - step) + 1.0}, trial
    )


def refusals(args):
    """What a trainer that shards may not be given."""
    import peft

    messages = {}
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    old, new = {"version": 1, "sync_module_states": "false"}, {"version": 2}
    for name, model, fsdp in (("FSDP1", tiny_opt(), old), ("PEFT", peft.get_peft_model(tiny_opt(), config), new)):
        trainer = trainer_of(args.out, model, fsdp=True, fsdp_config=fsdp)
        try:
            attach(trainer, torch.optim.AdamW, policy_of(args), link=LinkConfig(r=2))
        except ValueError as error:
            messages[name] = str(error)
        fresh_state()
    return messages


# Accelerate


def train_by_accelerate(args):
    plugin = None
    if args.wrapper == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=20, **args.fsdp
        )
        accelerate.PartialState(cpu=True)
        sharding_on_cpus()
    once = accelerate.DataLoaderConfiguration(split_batches=True)  # the scheduler steps once, whatever the number
    accelerator = accelerate.Accelerator(
        cpu=True, fsdp_plugin=plugin, mixed_precision=args.mixed, dataloader_config=once
    )
    module = Net()
    link = LinkConfig(r=ranks_of(args), lora_alpha=2, target_modules=BODY)
    opt = ChainOptimizer(torch.optim.AdamW, module, policy_of(args), link=link, lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 4)
    model, wrapped, scheduler = accelerator.prepare(module, opt, scheduler)
    accelerator.register_for_checkpointing(opt.chain)
    start = 0
    if args.resume is not None:
        accelerator.load_state(str(args.resume))
        start = opt.steps
    share, losses = 2 * ROWS // WORLD, []
    for step in range(start, 8):
        x, y = batch(step)
        mine = slice(RANK * share, (RANK + 1) * share)
        loss = (model(x[mine]) - y[mine]).square().mean()
        accelerator.backward(loss)
        opt.observe(loss)
        wrapped.step()
        scheduler.step()
        wrapped.zero_grad()
        losses.append(accelerator.reduce(loss.detach().clone(), "mean").item())
        if step + 1 in (3, 4) and args.resume is None:
            accelerator.save_state(str(args.out / f"state-{step + 1}"))
    lr = opt.param_groups[0]["lr"]
    opt.finish()
    return {**described(opt, model, accelerator.get_state_dict(model)), "losses": losses, "lr": lr}


if __name__ == "__main__":
    main()
