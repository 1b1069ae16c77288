"""The three objectives against a slow twin: one text at a time, no padding, sums in plain Python."""

import math

import pytest
import torch

from experiments.paper.encoding import Encoded, Encoder
from experiments.paper.objectives import LOSSES, TERMS, Collator, Example, examples, objective_of
from experiments.tasks import TASKS
from tests.experiments import small

transformers = pytest.importorskip("transformers")

# fp64 models: a few thousand operations of relative error 1e-16 each, on losses of order one
CLOSE = {"rtol": 1e-11, "atol": 1e-11}

NAMES = list(small.ROWS)
KINDS = ["opt", "llama"]


def batch_of(name, objective=None, multiple_of=8):
    tokenizer = small.tokenizer()
    items = examples(TASKS[name], small.samples(name), Encoder(tokenizer, max_length=256), objective)
    return items, Collator(tokenizer.pad_token_id, multiple_of)(items)


def log_probs(model, ids):
    """log p of every token but the first, by the definition."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].tolist()
    values = []
    for scores, token in zip(logits, ids[1:]):
        top = max(scores)
        values.append(scores[token] - top - math.log(sum(math.exp(score - top) for score in scores)))
    return values


def twin(model, objective, items):
    """The terms of an objective, in the order of the examples."""
    terms = []
    for item in items:
        if objective == "classification":
            scores = []
            for row in item.texts:
                option = log_probs(model, row.ids)[-row.option_len :]
                scores.append(sum(option) / row.option_len)
            terms.append(math.log(sum(math.exp(score) for score in scores)) - scores[item.gold])
        else:
            (row,) = item.texts
            values = log_probs(model, row.ids)
            terms += [-value for value in (values[-row.option_len :] if objective == "option" else values)]
    return terms


CASES = [(name, objective_of(TASKS[name])) for name in NAMES]
# ReCoRD's samples differ in their number of candidates
CASES += [("COPA", "classification"), ("ReCoRD", "classification"), ("SST-2", "option"), ("CB", "text")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "objective"), CASES)
def test_every_objective_equals_its_twin(kind, name, objective):
    model = small.model(kind)
    items, batch = batch_of(name, objective)
    expected = twin(model, objective, items)
    assert batch["attention_mask"].min() == 0  # there is padding to get wrong
    torch.testing.assert_close(TERMS[objective](model, batch).tolist(), expected, **CLOSE)
    assert LOSSES[objective](model, batch).item() == pytest.approx(sum(expected) / len(expected), rel=1e-11)


def test_the_objective_is_the_protocols():
    assert {name: objective_of(task) for name, task in TASKS.items()} == {
        **dict.fromkeys(["SST-2", "WSC", "CB", "WIC", "BoolQ", "MultiRC", "RTE"], "classification"),
        **dict.fromkeys(["DROP", "SQuAD", "COPA", "ReCoRD"], "option"),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", ["classification", "option", "text"])
def test_gradients_are_those_of_a_batch_of_one_each(kind, objective):
    """Padding, and candidates that an example does not have, leave no trace in the gradient."""
    items, batch = batch_of("ReCoRD", objective)
    whole, parts = small.model(kind).train(), small.model(kind).train()
    LOSSES[objective](whole, batch).backward()
    count = len(TERMS[objective](parts, batch))
    for item in items:
        (TERMS[objective](parts, Collator(0, 1)([item])).sum() / count).backward()
    for (name, a), b in zip(whole.named_parameters(), parts.parameters()):
        assert a.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)


def test_the_loss_falls_on_the_gold_candidate():
    model = small.model("opt").train()
    _, batch = batch_of("SST-2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = LOSSES["classification"](model, batch)
    first.backward()
    optimizer.step()
    assert LOSSES["classification"](model, batch) < first


def test_a_batch_is_padded_on_the_left_to_a_multiple():
    texts = Encoded((256, 7, 8, 9), 2), Encoded((256, 7, 5), 1), Encoded((256, 7, 1), 1)
    items = [Example(texts[:1]), Example(texts[1:], gold=1)]
    batch = Collator(pad_token_id=3, multiple_of=4)(items)
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(batch, torch.int64)
    assert batch["input_ids"].tolist() == [[3, 256, 7, 8], [3, 3, 256, 7], [3, 3, 256, 7]]
    assert batch["targets"].tolist() == [[3, 7, 8, 9], [3, 3, 7, 5], [3, 3, 7, 1]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2], [0, 0, 0, 1], [0, 0, 0, 1]]
    of_texts = ("context", "option_len", "num_options", "gold")
    assert [batch[name].tolist() for name in of_texts] == [[0, 1, 2], [2, 1, 1], [1, 2], [0, 1]]
    assert Collator(3, multiple_of=1)(items)["input_ids"].shape == (3, 3)
    shared = Collator(3, multiple_of=4, share=True)(items)
    assert shared["context"].tolist() == [0, 1, 1]
    assert all(torch.equal(shared[name], batch[name][:2]) for name in ("input_ids", "attention_mask", "position_ids"))
    assert all(torch.equal(shared[name], batch[name]) for name in ("targets", "option_len", "num_options", "gold"))


@pytest.mark.parametrize("name", ["CB", "ReCoRD"])
def test_a_context_that_is_shared_gives_the_same_loss_and_gradients(name):
    items, batch = batch_of(name, "classification")
    shared = Collator(1, share=True)(items)
    # two of CB's three words are one token each with this tokenizer
    assert len(shared["input_ids"]) == {"CB": 2 * len(items), "ReCoRD": len(batch["input_ids"])}[name]
    apart, together = small.model("opt"), small.model("opt")
    LOSSES["classification"](apart, batch).backward()
    LOSSES["classification"](together, shared).backward()
    for a, b in zip(apart.parameters(), together.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("objective", ["classification", "option", "text"])
def test_the_padding_token_does_not_matter(objective):
    items, _ = batch_of("ReCoRD", objective)
    model = small.model("llama")
    losses = [LOSSES[objective](model, Collator(pad, 8)(items)).item() for pad in (0, 1, 17)]
    assert losses[0] == losses[1] == losses[2]


def test_examples_of_a_choice_are_its_target_and_of_a_generation_no_candidates():
    record = small.samples("ReCoRD")[1]
    encoder = Encoder(small.tokenizer())
    (item,) = examples(TASKS["ReCoRD"], [record], encoder)
    assert item == Example((encoder.options(TASKS["ReCoRD"], record)[0],), 0)
    with pytest.raises(ValueError, match="objective='classification' needs candidates, and SQuAD has none"):
        examples(TASKS["SQuAD"], small.samples("SQuAD"), encoder, "classification")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_normalised_in_fp32(dtype):
    model = small.model("opt", dtype)
    _, batch = batch_of("SST-2")
    terms = TERMS["classification"](model, batch)
    assert terms.dtype == torch.float32
    assert torch.isfinite(terms).all()


@pytest.mark.parametrize("wrap", ["peft", "module"])
def test_wrapped_models_are_asked_through_their_wrapper(wrap):
    model = small.model("llama")
    _, batch = batch_of("SST-2")
    expected = TERMS["classification"](model, batch)
    if wrap == "peft":
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"])).double()
    else:
        wrapped = torch.nn.DataParallel(model)
    # fresh adapters add B A = 0
    torch.testing.assert_close(TERMS["classification"](wrapped, batch), expected, **CLOSE)


@pytest.mark.parametrize("name", ["CB", "SQuAD"])
def test_transformers_trainer_takes_collator_and_loss(name, tmp_path):
    """Two accumulated micro-batches in `Trainer` are one step by hand; its evaluation loss is the objective."""
    task, objective = TASKS[name], objective_of(TASKS[name])
    tokenizer = small.tokenizer()
    items = examples(task, small.samples(name)[:2], Encoder(tokenizer, max_length=256))
    collate = Collator(tokenizer.pad_token_id)

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = LOSSES[objective](model, inputs)
            return (loss, {}) if return_outputs else loss

    model, twin_model = small.model("opt"), small.model("opt")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        per_device_eval_batch_size=1, max_grad_norm=1e9, remove_unused_columns=False, label_names=["option_len"],
        prediction_loss_only=True, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no",
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=items,
        eval_dataset=items[:1],
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
    )
    expected = LOSSES[objective](twin_model, collate(items[:1])).item()
    # reported in fp32
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    trainer.train()
    for item in items:
        (LOSSES[objective](twin_model, collate([item])) / 2).backward()
    torch.optim.SGD(twin_model.parameters(), lr=0.1).step()
    for (key, a), b in zip(model.named_parameters(), twin_model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=key)
