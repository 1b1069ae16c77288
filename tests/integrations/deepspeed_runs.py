"""Ways to train a chain under DeepSpeed, and how each ends: started by test_deepspeed.py, prints one JSON object.

The environment makes a group of one process, on the CPU: what DeepSpeed does to the optimizer's groups does not depend
on the number.
"""

import json
import os
import sys

import accelerate
import deepspeed
import torch
import transformers

from cola import ChainOptimizer, LinkConfig, StepKnots
from cola.integrations.transformers import attach
from tests.models import BODY, Net, loss_of, tiny_opt

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is compiled: torch's collectives do as well


def config(stage):
    return {
        "train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip


def chained(model):
    link = LinkConfig(r=2, target_modules=BODY)
    return ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=5), link=link, lr=0.02)


def initialize(stage):
    model = Net()
    opt = chained(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine, *_ = deepspeed.initialize(model=model, optimizer=opt, config=config(stage))
    try:
        engine.backward(loss_of(engine, 0))
        engine.step()
    finally:
        if stage < 3:  # where the model still has its parameters
            assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
            assert opt.steps == 0


def engine_as_model():
    model = Net()
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config(1))
    chained(engine)


def sharded_as_model():
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        model = Net()
    chained(model)


def by_accelerate(stage):
    accelerator = accelerate.Accelerator(deepspeed_plugin=accelerate.DeepSpeedPlugin(hf_ds_config=config(stage)))
    assert accelerator.distributed_type == accelerate.DistributedType.DEEPSPEED
    model = Net()
    prepared, wrapped = accelerator.prepare(model, chained(model))
    accelerator.backward(loss_of(prepared, 0))
    wrapped.step()


def by_trainer(out):
    args = transformers.TrainingArguments(out, use_cpu=True, deepspeed=config(2), report_to=[])
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    trainer = transformers.Trainer(tiny_opt(), args, train_dataset=rows)
    attach(trainer, torch.optim.AdamW, StepKnots(every=2), link=LinkConfig(r=2))


def outcome(run, *args):
    try:
        run(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


if __name__ == "__main__":
    print(
        json.dumps(
            {
                **{f"initialize, stage {stage}": outcome(initialize, stage) for stage in (1, 2, 3)},
                "engine": outcome(engine_as_model),
                "zero.Init": outcome(sharded_as_model),
                "Accelerate": outcome(by_accelerate, 2),
                "Trainer": outcome(by_trainer, sys.argv[1]),
            }
        )
    )
    sys.stdout.flush()
    os._exit(0)
