"""The protocol's three objectives, and the batches they read.

Every objective is a mean of terms, so the loss of a whole set does not depend on how it was cut into batches:

* classification: one term per example, the cross-entropy over its K candidates. The mean log-probability of a
  candidate's tokens is its logit, -log softmax(s)_gold with s_k = mean_j log p(t_kj | what is before it);
* option: one term per token of the right option, -log p;
* text: one term per token of the whole text.

Rows are padded on the left, so options end together and only the last positions need logits. To train with
transformers' `Trainer`, use a `Collator` as `data_collator` and return `loss(model, inputs)` from `compute_loss`,
with `TrainingArguments(remove_unused_columns=False, label_names=["option_len"])`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from experiments.encoding import Encoded, Encoder
from experiments.tasks import Sample, Task

Batch = dict[str, Tensor]
"""int64 tensors. Of R rows and a width of T: `input_ids`, `attention_mask` and `position_ids`, R x T;
`option_len`, R. Of B examples: `num_options` and `gold`, B; the rows of an example are adjacent."""

Objective = Literal["classification", "option", "text"]


@dataclass(frozen=True)
class Example:
    """What one sample gives to training: a row per candidate and which one is right, or the right one alone."""

    rows: tuple[Encoded, ...]
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
    """Makes a batch of examples, padded on the left.

    Args:
        pad_token_id: any token; padding is never attended to, predicted or scored.
        multiple_of: the width is rounded up to a multiple of this; the protocol's 8 suits the hardware.
    """

    pad_token_id: int
    multiple_of: int = 8

    def __call__(self, batch: Sequence[Example]) -> Batch:
        """The batch of these examples."""
        rows = [row for example in batch for row in example.rows]
        longest = max(len(row.ids) for row in rows)
        width = -(-longest // self.multiple_of) * self.multiple_of
        ids = torch.full((len(rows), width), self.pad_token_id)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, width - len(row.ids) :] = torch.tensor(row.ids)
            mask[index, width - len(row.ids) :] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            # a text has its positions from 0 on wherever it stands in its row
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "option_len": torch.tensor([row.option_len for row in rows]),
            "num_options": torch.tensor([len(example.rows) for example in batch]),
            "gold": torch.tensor([example.gold for example in batch]),
        }


def log_probs(model: nn.Module, batch: Batch, last: int) -> Tensor:
    """log p(token | what is before it in its row) of the `last` tokens of every row: R x `last`.

    Computed in fp32, or in the model's own type if that is wider. Positions of padding hold no meaning.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    takes = _arguments(model)
    if "position_ids" in takes:
        inputs["position_ids"] = batch["position_ids"]
    # the head's logits are most of the memory of a long text, and only the option's are read
    logits = model(**inputs, **({"logits_to_keep": last + 1} if "logits_to_keep" in takes else {})).logits
    logits = logits[:, -last - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = batch["input_ids"][:, -last:].to(logits.device).unsqueeze(-1)
    return (logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)).squeeze(-1)


def _arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of the forward of transformers' model inside `model`."""
    if isinstance(inner := getattr(model, "module", None), nn.Module):  # DDP, FSDP
        return _arguments(inner)
    if callable(get := getattr(model, "get_base_model", None)):  # PEFT
        return _arguments(get())
    return inspect.signature(type(model).forward).parameters


def option_log_probs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the options' tokens, and a mask of what belongs to an option, both R x longest."""
    longest = int(batch["option_len"].max())
    values = log_probs(model, batch, longest)
    places = torch.arange(longest, 0, -1, device=values.device)
    return values, places <= batch["option_len"].to(values.device).unsqueeze(1)


def option_scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum and mean of the log-probabilities of every row's option tokens, R each."""
    values, belongs = option_log_probs(model, batch)
    total = values.masked_fill(~belongs, 0).sum(1)
    return total, total / belongs.sum(1)


def classification_terms(model: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy of every example over its candidates, B; examples may differ in their number."""
    scores = option_scores(model, batch)[1].split(batch["num_options"].tolist())
    # a candidate that is not there has probability 0
    logits = pad_sequence(list(scores), batch_first=True, padding_value=-torch.inf)
    return nn.functional.cross_entropy(logits, batch["gold"].to(logits.device), reduction="none")


def option_terms(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of every option token, in one dimension."""
    values, belongs = option_log_probs(model, batch)
    return -values[belongs]


def text_terms(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of every token but the first of every row, in one dimension."""
    width = batch["input_ids"].shape[1]
    values = log_probs(model, batch, width - 1)
    # a token counts if the one before it is there as well
    return -values[batch["attention_mask"][:, :-1].to(values.device) == 1]


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
