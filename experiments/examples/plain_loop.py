"""A chain in a plain loop: ``python experiments/examples/plain_loop.py [model directory or hub name] [steps]``.

Without a model it makes a tiny random one. Prints one line per knot and writes the merged model to ``merged/``.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from cola import ChainOptimizer, EvenKnots, LinkConfig

name, steps = (sys.argv[1:] + ["tiny", "30"][len(sys.argv) - 1 :])[:2]
torch.manual_seed(0)
tiny = OPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64)
tiny.word_embed_proj_dim = 32
model = OPTForCausalLM(tiny) if name == "tiny" else AutoModelForCausalLM.from_pretrained(name)
batches = torch.randint(3, 60, (int(steps), 4, 16))  # your data

policy = EvenKnots(length=3, total_steps=len(batches))
opt = ChainOptimizer(torch.optim.AdamW, model, policy=policy, link=LinkConfig(r=4), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, len(batches))
opt.on_knot(print)
model.train()
for ids in batches:
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    scheduler.step()
    opt.zero_grad()
opt.finish()
model.save_pretrained("merged")
opt.chain.save("chain")
