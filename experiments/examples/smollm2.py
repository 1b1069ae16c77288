"""A language model learns to write bookings as JSON: ``python -m experiments.examples.smollm2 [--steps 30]``.

From the untouched model to text of the fine-tuned one: Trainer with a chain, checkpoints, an adapter for PEFT, a merged
model. All files go to ``out/``. Killed and called again, it goes on from the last checkpoint there and ends with the
same bits; remove ``out/`` for a new run.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from cola import EvenKnots, LinkConfig
from cola.integrations.transformers import attach

SYSTEM = "Write the booking as JSON."
UNSEEN = ["Could Priya get a table for 7 on Sunday?", "Tell Wednesday's team: 3 seats for Anton."]


def bookings():
    """Requests for a table, and what the model should answer."""
    asks = ["A table for {guests} on {day}, please. {name}", "{name} would like to come on {day}, party of {guests}.",
            "Hi, it's {name}. Are {guests} seats free on {day}?", "{day}, {guests} people, under {name}."]  # fmt: skip
    names = ["Ines", "Otto", "Mara", "Jun", "Kofi", "Lena", "Omar", "Ruth"]
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
    for i in range(64):
        booking = {"name": names[i % 8], "guests": 2 + i % 7, "day": days[i % 5]}
        yield {"prompt": asks[i // 2 % 4].format(**booking), "completion": json.dumps(booking)}


def chat(prompt):
    """The tokens in front of an answer."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def example(prompt, completion):
    """Tokens and labels: the loss is that of the answer alone."""
    before, answer = chat(prompt), [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]
    return {"input_ids": before + answer, "labels": [-100] * len(before) + answer}


def answers(model):
    """What a model writes to requests that are not in the data."""
    for prompt in UNSEEN:
        ids = torch.tensor([chat(prompt)], device=model.device)
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        yield f"{prompt}\n    {tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)!r}"


parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("--model", default="smollm2", help="a folder or hub name; default the extra's SmolLM2")
parser.add_argument("--data", type=Path, help="JSON lines with prompt and completion; default made-up bookings")
parser.add_argument("--steps", type=int, default=30)
options = parser.parse_args()
if options.model == "smollm2":
    from experiments import smollm

    options.model = str(smollm.folder())

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
lines = map(json.loads, options.data.open(encoding="utf-8")) if options.data else bookings()
print("before:", *answers(model), sep="\n")

args = TrainingArguments(
    "out", max_steps=options.steps, per_device_train_batch_size=4, learning_rate=1e-3, lr_scheduler_type="constant",
    logging_steps=5, save_steps=max(1, options.steps // 6), save_total_limit=2, report_to=[], disable_tqdm=True,
)  # fmt: skip
trainer = Trainer(
    model, args, train_dataset=[example(**line) for line in lines], processing_class=tokenizer,
    data_collator=DataCollatorForSeq2Seq(tokenizer),
)  # fmt: skip
policy = EvenKnots(length=3, total_steps=options.steps)
link = LinkConfig(r=8, lora_alpha=8, target_modules="all-linear")
opt = attach(trainer, torch.optim.AdamW, policy=policy, link=link)
opt.on_knot(print)
whole = [state.parent for state in Path("out").glob("checkpoint-*/trainer_state.json")]  # not cut off by a kill
last = max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)
trainer.train(resume_from_checkpoint=last and str(last))

trainer.save_model("out/merged")  # the plain model with the chain in its weights, and the tokenizer
opt.chain.to_peft("out/adapter")  # all links as one adapter for the untouched model
print(opt.chain.summary())

merged = AutoModelForCausalLM.from_pretrained("out/merged").eval()
adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(options.model), "out/adapter").eval()
ids = torch.tensor([chat(UNSEEN[0])])
with torch.no_grad():
    error = (merged(ids).logits - adapted(ids).logits).abs().max()
print(f"merged model and adapter: logits differ by {error:.1e} at most")
print("after:", *answers(merged), sep="\n")
