"""What a model sees, byte for byte. The rows are made up; the strings are the protocol's."""

import doctest
import importlib
from typing import NamedTuple

import pytest

from experiments.tasks import TASKS, task


class Case(NamedTuple):
    name: str
    row: dict
    prompt: str
    fulls: list[str]
    gold: tuple[int, ...]
    null: str
    null_fulls: list[str]


CASES = [
    Case(
        "SST-2",
        {"sentence": " a quiet , patient film ", "label": 1, "idx": 3},
        "a quiet , patient film It was",
        ["a quiet , patient film It was terrible", "a quiet , patient film It was great"],
        (1,),
        " It was",
        [" It was terrible", " It was great"],
    ),
    Case(
        "WSC",
        {"text": "Ann rang Bea when She was late.", "span1_text": "Ann", "span2_text": "She", "label": 0},
        'Ann rang Bea when She was late.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
        [
            "Ann rang Bea when She was late.\n"
            'In the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\nNo',
            "Ann rang Bea when She was late.\n"
            'In the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\nYes',
        ],
        (0,),
        "",
        ["No", "Yes"],
    ),
    Case(
        "CB",
        {"premise": "A: I doubt that it rains.", "hypothesis": "it rains", "label": 2},
        'Suppose A: I doubt that it rains. Can we infer that "it rains"? Yes, No, or Maybe?\n',
        [
            'Suppose A: I doubt that it rains. Can we infer that "it rains"? Yes, No, or Maybe?\nYes',
            'Suppose A: I doubt that it rains. Can we infer that "it rains"? Yes, No, or Maybe?\nNo',
            'Suppose A: I doubt that it rains. Can we infer that "it rains"? Yes, No, or Maybe?\nMaybe',
        ],
        (2,),
        "",
        ["Yes", "No", "Maybe"],
    ),
    Case(
        "WIC",
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "He robbed a bank.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "A river bank.\nHe robbed a bank.\n",
        [
            'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
            "A river bank.\nHe robbed a bank.\nNo",
            'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
            "A river bank.\nHe robbed a bank.\nYes",
        ],
        (0,),
        "",
        ["No", "Yes"],
    ),
    Case(
        "BoolQ",
        {"question": "is tin a metal", "answer": True, "passage": "Tin is a soft metal."},
        "Tin is a soft metal. Is tin a metal?\n",
        ["Tin is a soft metal. Is tin a metal?\nYes", "Tin is a soft metal. Is tin a metal?\nNo"],
        (0,),
        "",
        ["Yes", "No"],
    ),
    Case(
        "MultiRC",
        {"paragraph": "Tom ate {two} figs.", "question": "Who ate?", "answer": "Tom", "label": 1, "idx": {"answer": 0}},
        'Tom ate {two} figs.\nQuestion: Who ate?\nI found this answer "Tom". Is that correct? Yes or No?\n',
        [
            'Tom ate {two} figs.\nQuestion: Who ate?\nI found this answer "Tom". Is that correct? Yes or No?\nNo',
            'Tom ate {two} figs.\nQuestion: Who ate?\nI found this answer "Tom". Is that correct? Yes or No?\nYes',
        ],
        (1,),
        "",
        ["No", "Yes"],
    ),
    Case(
        "RTE",
        {"premise": "It snowed all day.", "hypothesis": "It was cold.", "label": 0},
        'It snowed all day.\nDoes this mean that "It was cold." is true? Yes or No?\n',
        [
            'It snowed all day.\nDoes this mean that "It was cold." is true? Yes or No?\nYes',
            'It snowed all day.\nDoes this mean that "It was cold." is true? Yes or No?\nNo',
        ],
        (0,),
        "",
        ["Yes", "No"],
    ),
    Case(
        "COPA",
        {
            "premise": "The glass broke. ",
            "choice1": "I Dropped it.",
            "choice2": "The Queen sneezed.",
            "question": "cause",
            "label": 1,
        },
        "The glass broke because ",
        ["The glass broke because I Dropped it.", "The glass broke because the Queen sneezed."],
        (1,),
        "because",
        ["because I Dropped it.", "because the Queen sneezed."],
    ),
    Case(
        "COPA",
        {"premise": "Was it late?", "choice1": "It's over.", "choice2": "We left", "question": "effect", "label": 0},
        "Was it late? so ",
        ["Was it late? so it's over.", "Was it late? so we left"],
        (0,),
        "so",
        ["so it's over.", "so we left"],
    ),
    Case(
        "ReCoRD",
        {
            "passage": "Ada met Bob in Rome.\n@highlight\nAda is a pilot\n@highlight\nBob cooks",
            "query": "@placeholder flew, and @placeholder landed",
            "entities": ["Ada", "Bob", "Rome"],
            "answers": ["Bob", "Ada"],
        },
        "Ada met Bob in Rome.\n- Ada is a pilot\n- Bob cooks\n-",
        [
            "Ada met Bob in Rome.\n- Ada is a pilot\n- Bob cooks\n- Ada flew, and Ada landed",
            "Ada met Bob in Rome.\n- Ada is a pilot\n- Bob cooks\n- Bob flew, and Bob landed",
            "Ada met Bob in Rome.\n- Ada is a pilot\n- Bob cooks\n- Rome flew, and Rome landed",
        ],
        (1, 0),
        "-",
        ["- Ada flew, and Ada landed", "- Bob flew, and Bob landed", "- Rome flew, and Rome landed"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranked_prompts_are_exact(case):
    it = TASKS[case.name]
    sample = it.sample(case.row)
    assert it.prompt(sample) == case.prompt
    assert [it.full(sample, candidate) for candidate in sample.candidates] == case.fulls
    assert it.full(sample, sample.target) == case.fulls[case.gold[0]]
    assert sample.gold == case.gold
    assert it.null_prompt(sample) == case.null
    assert [it.null_full(sample, candidate) for candidate in sample.candidates] == case.null_fulls


@pytest.mark.parametrize(
    ("name", "row", "prompt", "full", "answers"),
    [
        (
            "SQuAD",
            {
                "title": "Tin",
                "context": "Tin melts at 232 degrees.",
                "question": " When does tin melt? ",
                "answers": {"text": ["at 232 degrees", "232"], "answer_start": [10, 13]},
            },
            "Title: Tin\nContext: Tin melts at 232 degrees.\nQuestion: When does tin melt?\nAnswer:",
            "Title: Tin\nContext: Tin melts at 232 degrees.\nQuestion: When does tin melt?\nAnswer: at 232 degrees\n",
            ("at 232 degrees", "232"),
        ),
        (
            "DROP",
            {
                "passage": "Nine of {ten} boats sank.",
                "question": "How many did not sink?\n",
                "answers_spans": {"spans": ["1", "one"], "types": ["number", "span"]},
            },
            "Passage: Nine of {ten} boats sank.\nQuestion: How many did not sink?\nAnswer:",
            "Passage: Nine of {ten} boats sank.\nQuestion: How many did not sink?\nAnswer: 1\n",
            ("1", "one"),
        ),
    ],
)
def test_generation_prompts_are_exact(name, row, prompt, full, answers):
    it = TASKS[name]
    sample = it.sample(row)
    assert it.prompt(sample) == prompt
    assert it.full(sample, sample.target) == full
    assert (sample.answers, sample.candidates, sample.gold) == (answers, (), ())
    with pytest.raises(NotImplementedError, match="cannot be calibrated"):
        it.null_prompt(sample)
    with pytest.raises(NotImplementedError, match="cannot be calibrated"):
        it.null_full(sample, "x")


@pytest.mark.parametrize(("given", "gold"), [(True, 0), (False, 1)])
def test_boolq_answers_yes_first(given, gold):
    row = {"question": "Is tin a metal?", "answer": given, "passage": "P."}
    sample = TASKS["BoolQ"].sample(row)
    assert (sample.gold, TASKS["BoolQ"].prompt(sample)) == ((gold,), "P. Is tin a metal?\n")


def test_the_table_of_tasks_is_the_protocols():
    assert list(TASKS) == [
        "SST-2", "WSC", "CB", "WIC", "BoolQ", "MultiRC", "RTE", "DROP", "SQuAD", "COPA", "ReCoRD",
    ]  # fmt: skip
    kinds = {name: it.kind for name, it in TASKS.items()}
    assert {name for name, kind in kinds.items() if kind == "choice"} == {"COPA", "ReCoRD"}
    assert {name for name, kind in kinds.items() if kind == "generation"} == {"DROP", "SQuAD"}
    assert {name: it.dev for name, it in TASKS.items() if it.dev != 500} == {"CB": 100, "COPA": 100}
    micro = {name: it.micro_batch for name, it in TASKS.items() if it.micro_batch != 8}
    assert micro == {"MultiRC": 2, "ReCoRD": 2, "DROP": 1}
    assert all(it.metric == ("f1" if it.kind == "generation" else "accuracy") for it in TASKS.values())
    assert {it.name for it in TASKS.values()} == set(TASKS)


@pytest.mark.parametrize("name", ["SST-2", "sst2", "SST 2", "copa", "ReCoRD", "WIC", "wic", "multi-rc"])
def test_names_are_forgiving(name):
    assert task(name) in TASKS.values()


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"task='mnli' is none of SST-2, .*ReCoRD"):
        task("mnli")


RTE = {"premise": "a", "hypothesis": "b", "label": 0}
COPA = {"premise": "a", "choice1": "b", "choice2": "c", "question": "cause", "label": 0}
RECORD = {"passage": "a", "query": "b", "entities": ["c"], "answers": ["c"]}
SQUAD = {"title": "a", "context": "b", "question": "c", "answers": {"text": ["d"]}}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("RTE", {"premise": "a", "label": 0}, r"RTE needs the field 'hypothesis' \(str\); this row has \['label'"),
        ("RTE", {**RTE, "label": "entailment"}, r"RTE: label='entailment' is str, expected int"),
        ("RTE", {**RTE, "label": True}, r"RTE: label=True is bool, expected int"),
        ("RTE", {**RTE, "label": -1}, r"label=-1 is none of 0 \(Yes\), 1 \(No\); -1 marks"),
        ("RTE", {**RTE, "label": 2}, r"label=2 is none of 0 \(Yes\), 1 \(No\)$"),
        ("BoolQ", {"question": "a", "passage": "b", "answer": 1}, r"answer=1 is int, expected bool"),
        ("COPA", {**COPA, "question": "why"}, r"question='why' is none of effect, cause"),
        ("COPA", {**COPA, "label": 2}, r"label=2 is none of 0 \(choice1\), 1 \(choice2\)"),
        ("ReCoRD", {**RECORD, "answers": ["d"]}, r"answers=\['d'\] must be one or more of \['c'\]"),
        ("ReCoRD", {**RECORD, "answers": []}, r"answers=\[\] must be one or more of"),
        ("SQuAD", {**SQUAD, "answers": {"text": []}}, r"answers\['text'\]=\[\] must be a list of one or more texts"),
        ("SQuAD", {**SQUAD, "answers": {}}, r"answers\['text'\]=None must be"),
        ("SQuAD", {**SQUAD, "answers": {"text": [3]}}, r"answers\['text'\]=\[3\] must be"),
    ],
)
def test_rows_that_are_not_the_tasks_are_refused(name, row, message):
    with pytest.raises(ValueError, match=message):
        TASKS[name].sample(row)


@pytest.mark.parametrize("name", ["models", "tasks", "paper.scoring"])
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(f"experiments.{name}"))
    assert (result.failed, result.attempted > 0) == (0, True)
