"""A chain under DDP or FSDP2: ``torchrun --nproc-per-node 2 experiments/examples/sharded.py {ddp,fsdp2} [steps]``.

The order matters: first the ChainOptimizer, which adds the links' parameters, then the wrapper, which must see them.
Every fourth step is saved to ``checkpoint-N``; a third argument names one to resume from, on any number of processes.
It runs on CPUs (gloo); on GPUs, move the model to its device and use the ``nccl`` backend.
"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import OPTConfig, OPTForCausalLM

from cola import ChainOptimizer, EvenKnots, LinkConfig

kind, steps, resume = (sys.argv[1:] + ["fsdp2", "12", ""][len(sys.argv) - 1 :])[:3]
dist.init_process_group("gloo")
torch.manual_seed(0)
config = OPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64)
config.word_embed_proj_dim, config.dropout = 32, 0.0  # with dropout, save its random states too
model = OPTForCausalLM(config)
batches = torch.randint(3, 60, (int(steps), dist.get_world_size(), 4, 16))  # your data, a share for each process

policy = EvenKnots(length=3, total_steps=len(batches))
opt = ChainOptimizer(torch.optim.AdamW, model, policy=policy, link=LinkConfig(r=4), lr=1e-3)
if kind == "ddp":
    called = torch.nn.parallel.DistributedDataParallel(model)
else:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.decoder.layers:
        fully_shard(layer, mesh=mesh)
    called = fully_shard(model, mesh=mesh)


def checkpoint():
    """The state to save, and to load into. `get_state_dict` drops the links, so the chain goes along."""
    weights, state = get_state_dict(model, opt)
    return {"model": weights, "optimizer": state, "chain": opt.chain}


if resume:
    saved = checkpoint()
    dcp.load(saved, checkpoint_id=resume)
    set_state_dict(model, opt, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
for shares in batches[opt.steps :]:
    ids = shares[dist.get_rank()]
    called(input_ids=ids, labels=ids).loss.backward()
    opt.step()
    opt.zero_grad()
    if opt.steps % 4 == 0:
        dcp.save(checkpoint(), checkpoint_id=f"checkpoint-{opt.steps}")
opt.finish()
weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 0:
    model.save_pretrained("merged", state_dict=weights)
    opt.chain.save("chain")
    print(opt.chain)
dist.barrier()  # no process leaves while others still communicate
dist.destroy_process_group()
