"""The protocol's three objectives, and the batches they read.

Every objective is a mean of terms, so the loss of a set does not depend on its division into batches:

* classification: one term per example, the cross-entropy over its K candidates. The mean log-probability of a
  candidate's tokens is its logit, -log softmax(s)_gold with s_k = mean_j log p(t_kj | the tokens before it);
* option: one term per token of the right option, -log p;
* text: one term per token of the whole text.

A text's last token is predicted but never read, so a model is given the text without it: the context. Contexts are
padded on the left, so options end together and only the last positions need logits. To train with
transformers' `Trainer`, use a `Collator` as `data_collator` and return `loss(model, inputs)` from `compute_loss`,
with `TrainingArguments(remove_unused_columns=False, label_names=["option_len"])`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from experiments.paper.encoding import Encoded, Encoder
from experiments.tasks import Sample, Task

Batch = dict[str, Tensor]
"""int64 tensors. Of C contexts and a width of T: `input_ids`, `attention_mask` and `position_ids`, C x T. Of R texts:
`context`, R, the index of each one's context; `targets`, R x T, the token that follows every position of it;
`option_len`, R. Of B examples: `num_options` and `gold`, B; the texts of an example are adjacent."""

Objective = Literal["classification", "option", "text"]


@dataclass(frozen=True)
class Example:
    """A sample for training: a text per candidate and the index of the right one, or only the right text."""

    texts: tuple[Encoded, ...]
    gold: int = 0


def objective_of(task: Task) -> Objective:
    """The objective that the protocol trains `task` with."""
    return "classification" if task.kind == "classification" else "option"


def examples(
    task: Task, samples: Iterable[Sample], encoder: Encoder, objective: Objective | None = None
) -> list[Example]:
    """The training examples of `samples`.

    Args:
        task: the samples' task.
        samples: in the order of the examples.
        encoder: of the model.
        objective: default `objective_of(task)`.

    Raises:
        ValueError: "classification" is asked for where there are no candidates.
    """
    objective = objective_of(task) if objective is None else objective
    if objective == "classification":
        if task.kind == "generation":
            raise ValueError(f"objective={objective!r} needs candidates, and {task.name} has none; use 'option'")
        return [Example(encoder.options(task, sample), sample.gold[0]) for sample in samples]
    return [Example((encoder.target(task, sample),)) for sample in samples]


@dataclass(frozen=True)
class Collator:
    """Makes a batch of examples.

    Args:
        pad_token_id: any token; padding is never attended to, predicted or scored.
        multiple_of: the width is rounded up to a multiple of this; the protocol's 8 suits the hardware.
        share: run a context that several texts share once; candidates of one token each share theirs. Loss and
            gradients are the same up to rounding, at 1/K of the work, if the model has no dropout.
    """

    pad_token_id: int
    multiple_of: int = 8
    share: bool = False

    def __call__(self, batch: Sequence[Example]) -> Batch:
        """The batch of these examples."""
        texts = [text for example in batch for text in example.texts]
        keys = [text.ids[:-1] if self.share else index for index, text in enumerate(texts)]
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        contexts = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        inputs, mask = padded([texts[first[key]].ids[:-1] for key in contexts], self.pad_token_id, self.multiple_of)
        targets = padded([text.ids[1:] for text in texts], self.pad_token_id, self.multiple_of)[0]
        return {
            "input_ids": inputs,
            "attention_mask": mask,
            # a text's positions start at 0 wherever its row's padding ends
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "context": torch.tensor([contexts[key] for key in keys]),
            "targets": targets,
            "option_len": torch.tensor([text.option_len for text in texts]),
            "num_options": torch.tensor([len(example.texts) for example in batch]),
            "gold": torch.tensor([example.gold for example in batch]),
        }


def padded(rows: Sequence[Sequence[int]], pad_token_id: int, multiple_of: int = 1) -> tuple[Tensor, Tensor]:
    """`rows` padded on the left to one width, and a mask that is 1 where they are: int64, both R x T."""
    width = -(-max(map(len, rows)) // multiple_of) * multiple_of
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids, mask


def log_probs(model: nn.Module, batch: Batch, last: int) -> Tensor:
    """log p(token | the tokens before it) of the `last` tokens of every text: R x `last`.

    Computed in fp32, or in the model's type if that is wider. Values at padding are meaningless.
    """
    takes = inspect.signature(type(unwrapped(model)).forward).parameters
    # the logits take most of the memory of a long text, and only the option's are needed
    extras = {"position_ids": batch["position_ids"], "logits_to_keep": last, "use_cache": False}
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        **{name: value for name, value in extras.items() if name in takes},
    )
    logits = output.logits[:, -last:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    context = batch["context"].to(logits.device)
    targets = batch["targets"][:, -last:].to(logits.device)
    places = torch.arange(last, device=logits.device)
    return logits[context.unsqueeze(1), places, targets] - logits.logsumexp(-1)[context]


def unwrapped(model: nn.Module) -> Any:
    """The model of transformers inside DDP's and PEFT's wrappers, or `model` itself."""
    if isinstance(inner := getattr(model, "module", None), nn.Module):
        return unwrapped(inner)
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def option_log_probs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the options' tokens, and a mask of these tokens, both R x longest."""
    longest = int(batch["option_len"].max())
    values = log_probs(model, batch, longest)
    places = torch.arange(longest, 0, -1, device=values.device)
    return values, places <= batch["option_len"].to(values.device).unsqueeze(1)


def option_scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum and mean of the log-probabilities of every text's option tokens, R each."""
    values, belongs = option_log_probs(model, batch)
    total = values.masked_fill(~belongs, 0).sum(1)
    return total, total / belongs.sum(1)


def classification_terms(model: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy of every example over its candidates, B; examples may differ in their number."""
    scores = option_scores(model, batch)[1].split(batch["num_options"].tolist())
    # a missing candidate has probability 0
    logits = pad_sequence(list(scores), batch_first=True, padding_value=-torch.inf)
    return nn.functional.cross_entropy(logits, batch["gold"].to(logits.device), reduction="none")


def option_terms(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of every option token, in one dimension."""
    values, belongs = option_log_probs(model, batch)
    return -values[belongs]


def text_terms(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of every token but the first of every text, in one dimension."""
    values = log_probs(model, batch, batch["targets"].shape[1])
    return -values[batch["attention_mask"][batch["context"]].to(values.device) == 1]


TERMS: Mapping[Objective, Callable[[nn.Module, Batch], Tensor]] = {
    "classification": classification_terms,
    "option": option_terms,
    "text": text_terms,
}
"""Objective -> its terms."""


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean of `classification_terms`, a scalar."""
    return classification_terms(model, batch).mean()


def option_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean of `option_terms`, a scalar: over all option tokens of the batch."""
    return option_terms(model, batch).mean()


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean of `text_terms`, a scalar: over all tokens of the batch."""
    return text_terms(model, batch).mean()


LOSSES: Mapping[Objective, Callable[[nn.Module, Batch], Tensor]] = {
    "classification": classification_loss,
    "option": option_loss,
    "text": text_loss,
}
"""Objective -> its loss, a function of model and batch."""
