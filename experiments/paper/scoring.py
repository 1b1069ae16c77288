"""A model's score on samples: ranked candidates, generated answers, and the loss on a dev set.

Contexts are sorted by length and run `batch_size` at a time, and a context that candidates share is run once. That
changes only the speed and, by rounding, the last digits of a score. The protocol's evaluation runs every text
separately.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from experiments.paper.encoding import NEW_TOKENS, Encoded, Encoder, Tokenizer, window
from experiments.paper.objectives import (
    TERMS,
    Collator,
    Example,
    Objective,
    examples,
    objective_of,
    option_scores,
    padded,
    unwrapped,
)
from experiments.tasks import Sample, Task

Calibration = Literal["sfc", "icl_sfc"]
"""Scores relative to the null prompt, without or with the demonstrations in front of it."""


DEMONSTRATIONS = 32
"""How many solved samples the protocol's in-context learning shows."""


@dataclass(frozen=True)
class Score:
    """The score of one evaluation.

    Attributes:
        metric: "accuracy" or "f1".
        value: its mean over the samples, in per cent.
        per_sample: the metric of every sample, from 0 to 1, in the samples' order.
        predictions: the index of the chosen candidate, or the generated text, of every sample.
        extra: further metrics by name, in per cent: "em" for generated answers.
        candidate_scores: for ranked tasks, the score of every candidate of every sample.
    """

    metric: str
    value: float
    per_sample: tuple[float, ...]
    predictions: tuple[int, ...] | tuple[str, ...]
    extra: Mapping[str, float] = field(default_factory=dict)
    candidate_scores: tuple[tuple[float, ...], ...] = ()


def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer,
    task: Task,
    samples: Sequence[Sample],
    *,
    batch_size: int = 1,
    demonstrations: Sequence[Sample] = (),
    calibrate: Calibration | Literal[False] = False,
    max_length: int | None = None,
    max_new_tokens: int = NEW_TOKENS,
) -> Score:
    """Score `model` on `samples`; its mode and gradients do not change.

    Args:
        model: a causal language model of transformers, plain or with adapters.
        tokenizer: the model's.
        task: the samples' task.
        samples: one or more.
        batch_size: contexts per forward pass: one per sample where all candidates are single tokens, else one per
            candidate.
        demonstrations: solved samples shown before every text; a text that is too long is cut from the left. The
            protocol shows 32, `split(task, seed, train=DEMONSTRATIONS, dev=0).train`.
        calibrate: False, or rank by sum log p(option | prompt) - sum log p(option | null prompt).
        max_length: tokens per text; by default the model's number of positions, 2048 at most.
        max_new_tokens: tokens per generated answer.

    Raises:
        ValueError: there are no samples, `batch_size` is below 1, or `calibrate` is unknown or used
            where answers are generated.
    """
    if not samples:
        raise ValueError("samples: there are none to score")
    if calibrate not in (False, "sfc", "icl_sfc"):
        raise ValueError(f"calibrate={calibrate!r} must be False, 'sfc' or 'icl_sfc'")
    if calibrate and task.kind == "generation":
        raise ValueError(f"calibrate={calibrate!r}: {task.name}'s answers are generated, not ranked; use False")
    encoder = Encoder(tokenizer, window(unwrapped(model).config) if max_length is None else max_length, max_new_tokens)
    with _evaluating(model):
        if task.kind == "generation":
            prompts = [encoder.prompt(task, sample, demonstrations) for sample in samples]
            return _of_answers(generate(model, encoder, prompts, batch_size), samples)
        texts = [encoder.options(task, sample, demonstrations) for sample in samples]
        totals, means = _scores(model, encoder, texts, batch_size)
        if not calibrate:
            return _of_ranks(means, samples)
        shown = demonstrations if calibrate == "icl_sfc" else ()
        null_texts = [encoder.null_options(task, sample, shown) for sample in samples]
        nulls, _ = _scores(model, encoder, null_texts, batch_size)
        gains = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(totals, nulls, strict=True)]
        return _of_ranks(gains, samples)


def _of_ranks(scores: Sequence[Sequence[float]], samples: Sequence[Sample]) -> Score:
    # max returns the first of equals
    predictions = tuple(max(range(len(of)), key=of.__getitem__) for of in scores)
    right = tuple(float(chosen in sample.gold) for chosen, sample in zip(predictions, samples, strict=True))
    return Score("accuracy", _per_cent(right), right, predictions, {}, tuple(map(tuple, scores)))


def _of_answers(answers: Sequence[str], samples: Sequence[Sample]) -> Score:
    pairs = [(answer, sample.answers) for answer, sample in zip(answers, samples, strict=True)]
    overlaps = tuple(f1(*pair) for pair in pairs)
    exact = _per_cent([exact_match(*pair) for pair in pairs])
    return Score("f1", _per_cent(overlaps), overlaps, tuple(answers), {"em": exact})


def dev_loss(
    model: nn.Module,
    tokenizer: Tokenizer,
    task: Task,
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
    objective: Objective | None = None,
    max_length: int | None = None,
) -> float:
    """The training objective on `samples` taken as one batch; the checkpoint with the lowest one is kept.

    Args:
        model: as in `evaluate`.
        tokenizer: the model's.
        task: the samples' task.
        samples: one or more.
        batch_size: examples per forward pass; it does not change the result beyond rounding.
        objective: default the task's.
        max_length: as in `evaluate`.

    Raises:
        ValueError: there are no samples, or `batch_size` is below 1.
    """
    if not samples:
        raise ValueError("samples: there are none to score")
    encoder = Encoder(tokenizer, window(unwrapped(model).config) if max_length is None else max_length)
    objective = objective_of(task) if objective is None else objective
    items = examples(task, samples, encoder, objective)
    collate = _collator(encoder)
    total, count = 0.0, 0
    with _evaluating(model):
        lengths = [max(len(text.ids) for text in item.texts) for item in items]
        for chosen in _by_length(lengths, batch_size):
            batch = _on_device(model, collate([items[index] for index in chosen]))
            terms = TERMS[objective](model, batch)
            total += terms.double().sum().item()
            count += terms.numel()
    return total / count


def generate(model: nn.Module, encoder: Encoder, prompts: Sequence[Encoded], batch_size: int) -> list[str]:
    """The greedy answer to every prompt, without special tokens and surrounding white space.

    An answer ends at a newline, at the end of text, or after `encoder.max_new_tokens` tokens.
    """
    answers = [""] * len(prompts)
    for chosen in _by_length([len(prompt.ids) for prompt in prompts], batch_size):
        ids, mask = padded([prompts[index].ids for index in chosen], _pad(encoder))
        batch = _on_device(model, {"input_ids": ids, "attention_mask": mask})
        tokens = unwrapped(model).generate(**batch, generation_config=_greedy(encoder))
        for index, new in zip(chosen, tokens[:, ids.shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(new) if token in encoder.stops), len(new))
            answers[index] = encoder.tokenizer.decode(new[:end], skip_special_tokens=True).strip()
    return answers


def normalised(text: str) -> str:
    """`text` in lower case without punctuation, English articles and superfluous white space.

    Example:
        >>> normalised("The  U.S. Army")
        'us army'
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The F1 of the words shared with an answer, the best over `answers`, from 0 to 1.

    Where the answer is that there is none ("CANNOTANSWER" or "no answer"), 1 for saying so and 0 otherwise.
    """
    if answers[0] in ("CANNOTANSWER", "no answer"):
        return float(normalised(prediction) == normalised(answers[0]))
    words = normalised(prediction).split()
    return max(_overlap(words, normalised(answer).split()) for answer in answers)


def _overlap(words: list[str], answer: list[str]) -> float:
    shared = sum((Counter(words) & Counter(answer)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(words), shared / len(answer)
    return 2 * precision * recall / (precision + recall)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of `answers` after `normalised`, else 0."""
    return float(any(normalised(prediction) == normalised(answer) for answer in answers))


def _scores(
    model: nn.Module, encoder: Encoder, samples: Sequence[Sequence[Encoded]], batch_size: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Sum and mean of the log-probabilities of every option of every sample."""
    texts = [text for sample in samples for text in sample]
    totals, means = [0.0] * len(texts), [0.0] * len(texts)
    having: dict[tuple[int, ...], list[int]] = {}
    for index, text in enumerate(texts):
        having.setdefault(text.ids[:-1], []).append(index)
    groups = list(having.values())
    collate = _collator(encoder)
    for chosen in _by_length([len(context) for context in having], batch_size):
        indices = [index for group in chosen for index in groups[group]]
        batch = _on_device(model, collate([Example((texts[index],)) for index in indices]))
        total, mean = option_scores(model, batch)
        for index, one, other in zip(indices, total.tolist(), mean.tolist(), strict=True):
            totals[index], means[index] = one, other
    ends = [sum(map(len, samples[: index + 1])) for index in range(len(samples))]
    cuts = list(zip([0, *ends], ends, strict=False))
    return [totals[start:end] for start, end in cuts], [means[start:end] for start, end in cuts]


def _by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first: too little memory then fails at once."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _collator(encoder: Encoder) -> Collator:
    # one text at a time needs no padding, so the width is not rounded up
    return Collator(_pad(encoder), multiple_of=1, share=True)


def _pad(encoder: Encoder) -> int:
    return encoder.tokenizer.pad_token_id or 0


def _greedy(encoder: Encoder) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=encoder.max_new_tokens,
        bos_token_id=encoder.tokenizer.bos_token_id,
        eos_token_id=list(encoder.stops),
        pad_token_id=_pad(encoder),
        use_cache=True,
    )


def _on_device(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _per_cent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of every module is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
