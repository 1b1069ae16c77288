"""A chain in transformers' Trainer: ``python experiments/examples/trainer.py [model directory or hub name] [steps]``.

Without a model it makes a tiny random one. Checkpoints are in ``out/``; the merged model goes to ``merged/``.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, Trainer, TrainingArguments

from cola import EvenKnots, LinkConfig
from cola.integrations.transformers import attach

name, steps = (sys.argv[1:] + ["tiny", "30"][len(sys.argv) - 1 :])[:2]
torch.manual_seed(0)
tiny = OPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64)
tiny.word_embed_proj_dim = 32
model = OPTForCausalLM(tiny) if name == "tiny" else AutoModelForCausalLM.from_pretrained(name)
data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 60, (64, 16))]  # your data

args = TrainingArguments(
    "out", max_steps=int(steps), learning_rate=1e-3, per_device_train_batch_size=4, save_steps=10, logging_steps=10
)
trainer = Trainer(model, args, train_dataset=data)
opt = attach(trainer, torch.optim.AdamW, policy=EvenKnots(length=3, total_steps=args.max_steps), link=LinkConfig(r=4))
trainer.train()
trainer.save_model("merged")
print(opt.chain)
