"""A chain in TRL's SFTTrainer, on a chat set: ``python experiments/examples/sft_chat.py [model] [steps]``.

Without a model it makes a tiny random one and a tokenizer of a few words. The merged model goes to ``merged/``.
"""

import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from cola import LinkConfig, PlateauKnots
from cola.integrations.transformers import attach

WORDS = [
    "<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", "what", "is", "a", "knot", "?", "the", "link", "merged",
    "into", "weights", ".",
]  # fmt: skip
TEMPLATE = "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"


def tiny():
    """A random model, and a tokenizer with a chat template."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = OPTConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64)
    config.word_embed_proj_dim = 32
    return OPTForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special)


name, steps = (sys.argv[1:] + ["tiny", "30"][len(sys.argv) - 1 :])[:2]
torch.manual_seed(0)
if name == "tiny":
    model, tokenizer = tiny()
else:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
chat = [
    {"role": "user", "content": "what is a knot ?"},
    {"role": "assistant", "content": "the link merged into the weights ."},
]
data = Dataset.from_dict({"messages": [chat] * 64})  # your data

args = SFTConfig(
    "out",
    max_steps=int(steps),
    learning_rate=1e-3,
    per_device_train_batch_size=4,
    max_length=64,
    bf16=torch.cuda.is_available(),
)
trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
opt = attach(trainer, torch.optim.AdamW, policy=PlateauKnots(window=5, patience=1), link=LinkConfig(r=4))
trainer.train()
trainer.save_model("merged")
print(opt.chain)
