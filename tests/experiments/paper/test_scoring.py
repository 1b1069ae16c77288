"""Scores: metrics by table, ranking and generation against slow twins, batches against one at a time."""

import math

import pytest
import torch

from experiments import models
from experiments.paper.encoding import Encoded, Encoder
from experiments.paper.objectives import Collator, examples, option_scores
from experiments.paper.scoring import dev_loss, evaluate, exact_match, f1, generate, normalised
from experiments.tasks import TASKS
from tests.experiments import small

transformers = pytest.importorskip("transformers")

RANKED = ["SST-2", "CB", "COPA", "ReCoRD"]
KINDS = ["opt", "llama"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  U.S. Army", "us army"),
        ("an apple, a pear\nand the theatre", "apple pear and theatre"),
        ("A-team", "ateam"),
        ("«Été»", "«été»"),
        ("the a an", ""),
    ],
)
def test_normalisation(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "score", "exact"),
    [
        ("the red fox", ["red fox"], 1, 1),
        ("red fox jumps", ["red fox"], 0.8, 0),  # P = 2/3, R = 1
        ("fox", ["a red fox", "fox."], 1, 1),  # the best of the answers
        ("red red fox", ["red fox fox"], 2 / 3, 0),  # words count as often as both have them
        ("cat", ["dog"], 0, 0),
        ("", ["dog"], 0, 0),
        ("the", ["a"], 0, 1),  # nothing is left to overlap, and nothing equals nothing
        ("no answer", ["no answer"], 1, 1),
        ("no", ["no answer", "no"], 0, 1),  # only saying so counts where there is none
        ("CANNOTANSWER", ["CANNOTANSWER"], 1, 1),
    ],
)
def test_f1_and_exact_match(prediction, answers, score, exact):
    assert f1(prediction, answers) == pytest.approx(score, rel=1e-15)
    assert exact_match(prediction, answers) == exact


@torch.no_grad()
def twin(model, encoder, task, samples, demonstrations=(), calibrate=False):
    """The protocol's ranking: one text at a time, without padding."""

    def tokens(row):
        ids = torch.tensor([row.ids])
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return logs[torch.arange(len(row.ids) - 1), ids[0, 1:]][-row.option_len :]

    scores = []
    for sample in samples:
        rows = encoder.options(task, sample, demonstrations)
        if not calibrate:
            scores.append([tokens(row).mean().item() for row in rows])
            continue
        nulls = encoder.null_options(task, sample, demonstrations if calibrate == "icl_sfc" else ())
        scores.append([(tokens(row).sum() - tokens(null).sum()).item() for row, null in zip(rows, nulls)])
    return scores


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("calibrate", [False, "sfc", "icl_sfc"])
@pytest.mark.parametrize("shots", [0, 1])
def test_ranking_equals_its_twin_in_batches_of_any_size(kind, name, calibrate, shots):
    task, samples, tokenizer = TASKS[name], small.samples(name), small.tokenizer()
    shown, samples = samples[:shots], samples[shots:]
    model = small.model(kind)
    expected = twin(model, Encoder(tokenizer, 256), task, samples, shown, calibrate)
    for size in (1, 2, 3, 100):
        score = evaluate(model, tokenizer, task, samples, batch_size=size, demonstrations=shown, calibrate=calibrate)
        for got, want in zip(score.candidate_scores, expected, strict=True):
            # fp64, sums of some dozens of log-probabilities of up to ten
            torch.testing.assert_close(list(got), want, rtol=1e-10, atol=1e-10)
        best = [of.index(max(of)) for of in expected]
        assert list(score.predictions) == best
        assert score.per_sample == tuple(float(one in sample.gold) for one, sample in zip(best, samples))
        assert score.value == 100 * sum(score.per_sample) / len(samples)
        assert (score.metric, score.extra) == ("accuracy", {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_in_fp32_is_one_at_a_time_up_to_rounding(kind):
    """Every value is a chain of two layers' sums over at most 64 terms, so 2 * 64 roundings of logits below 2^5."""
    tokenizer = small.tokenizer()
    for name in RANKED:
        single, batch = (
            evaluate(small.model(kind, torch.float32), tokenizer, TASKS[name], small.samples(name), batch_size=size)
            for size in (1, 5)
        )
        assert single.predictions == batch.predictions
        for a, b in zip(single.candidate_scores, batch.candidate_scores):
            torch.testing.assert_close(a, b, rtol=0, atol=2 * 64 * 2**5 * torch.finfo(torch.float32).eps)


def test_the_first_of_equals_is_chosen_and_any_gold_is_right():
    task = TASKS["ReCoRD"]
    row = {"passage": "p", "query": "@placeholder", "entities": ["one", "two"], "answers": ["two", "one"]}
    model = small.model("opt")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # every token is as likely as any other
    score = evaluate(model, small.tokenizer(), task, [task.sample(row)])
    assert score.candidate_scores[0] == pytest.approx([-math.log(300)] * 2)
    assert (score.predictions, score.value) == ((0,), 100)


@torch.no_grad()
def greedy(model, encoder, prompt, count):
    """The argmax of a forward pass over everything so far, again and again."""
    ids, new = list(prompt.ids), []
    while len(new) < count:
        token = model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax().item()
        if token in encoder.stops:
            break
        new.append(token)
    return encoder.tokenizer.decode(new, skip_special_tokens=True).strip(), len(new)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_its_twin_in_batches_of_any_size(kind):
    task, samples, tokenizer = TASKS["SQuAD"], small.samples("SQuAD"), small.tokenizer()
    model = small.model(kind)
    encoder = Encoder(tokenizer, max_length=256, max_new_tokens=9)
    expected = [greedy(model, encoder, encoder.prompt(task, sample), 9)[0] for sample in samples]
    assert len(set(expected)) > 1
    for size in (1, 2, 3):
        score = evaluate(model, tokenizer, task, samples, batch_size=size, max_new_tokens=9)
        assert list(score.predictions) == expected
        assert score.per_sample == tuple(f1(text, sample.answers) for text, sample in zip(expected, samples))
    assert set(score.extra) == {"em"}
    assert (score.metric, score.candidate_scores) == ("f1", ())


def test_an_answer_ends_at_a_newline_and_others_go_on():
    """The tiny model over bytes: its answers to these prompts end at different places."""
    model, tokenizer = models.load("tiny", device="cpu")
    tokenizer.pad_token_id = ord("!")  # what fills up an answer that has ended is no part of it
    encoder = Encoder(tokenizer, max_length=257, max_new_tokens=24)
    texts = ["import os\nimport sys", "    return self", "def main():", "The following"]
    prompts = [Encoded(encoder.ids(text), 0) for text in texts]
    expected = [greedy(model, encoder, prompt, 24) for prompt in prompts]
    lengths = {length for _, length in expected}
    assert min(lengths) < 24
    assert len(lengths) > 1
    for size in (1, 4):
        assert generate(model, encoder, prompts, size) == [text for text, _ in expected]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(small.ROWS))
def test_the_dev_loss_does_not_depend_on_the_batches(kind, name):
    task, samples, tokenizer, model = TASKS[name], small.samples(name), small.tokenizer(), small.model(kind)
    items = examples(task, samples, Encoder(tokenizer, 256))
    collate = Collator(tokenizer.pad_token_id)
    with torch.no_grad():
        if task.kind == "classification":
            scores = [option_scores(model, collate([item]))[1] for item in items]
            terms = [-of.log_softmax(0)[item.gold].item() for of, item in zip(scores, items)]
        else:
            terms = [-option_scores(model, collate([item]))[0].item() for item in items]
    count = len(items) if task.kind == "classification" else sum(item.texts[0].option_len for item in items)
    for size in (1, 2, 8):
        assert dev_loss(model, tokenizer, task, samples, batch_size=size) == pytest.approx(
            sum(terms) / count, rel=1e-11
        )


def test_the_model_is_left_as_it_was():
    model, tokenizer = small.model("opt").train(), small.tokenizer()
    model.model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    evaluate(model, tokenizer, TASKS["SQuAD"], small.samples("SQuAD"), batch_size=2, max_new_tokens=3)
    dev_loss(model, tokenizer, TASKS["CB"], small.samples("CB"))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_with_adapters_generates_and_ranks():
    peft = pytest.importorskip("peft")
    tokenizer, plain = small.tokenizer(), small.model("opt")
    wrapped = peft.get_peft_model(small.model("opt"), peft.LoraConfig(target_modules=["q_proj", "v_proj"])).double()
    for name in ("SQuAD", "CB"):
        arguments = (tokenizer, TASKS[name], small.samples(name))
        options = {"batch_size": 2, "max_new_tokens": 5}
        # fresh adapters add nothing
        assert (
            evaluate(wrapped, *arguments, **options).predictions == evaluate(plain, *arguments, **options).predictions
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": []}, "samples: there are none to score"),
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"calibrate": True}, "calibrate=True must be False, 'sfc' or 'icl_sfc'"),
        ({"calibrate": "sfc", "task": TASKS["SQuAD"]}, "calibrate='sfc': SQuAD's answers are generated"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    arguments = {"task": TASKS["CB"], "samples": small.samples("CB"), **changes}
    with pytest.raises(ValueError, match=message):
        evaluate(small.model("opt"), small.tokenizer(), **arguments)
