"""Tokens: how many are the option, what is cut, what opens a text."""

import pytest

from experiments.models import ByteTokenizer
from experiments.paper.encoding import Encoded, Encoder, window
from experiments.tasks import TASKS
from tests.experiments import small

pytest.importorskip("transformers")

SST2, COPA, SQUAD = TASKS["SST-2"], TASKS["COPA"], TASKS["SQuAD"]
BYTES = ByteTokenizer()


def read(encoded, tokenizer=BYTES):
    """The text of some tokens, the text of their option."""
    ids = list(encoded.ids)
    return tokenizer.decode(ids), tokenizer.decode(ids[len(ids) - encoded.option_len :])


def test_bytes_go_there_and_back():
    text = "naïve ☃\n"
    assert BYTES.encode(text)[0] == BYTES.bos_token_id
    assert BYTES.encode(text, add_special_tokens=False) == list(text.encode())
    assert BYTES.decode(BYTES.encode(text), skip_special_tokens=True) == text
    assert BYTES.decode(BYTES.encode(text)) == "<s>" + text
    assert BYTES.decode(list("☃".encode())[:2]) == "�"
    assert len(BYTES) == 257


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # the space goes with the option: prompts lose the spaces at their ends
        ("SST-2", [(" terrible"), (" great")]),
        ("CB", ["Yes", "No", "Maybe"]),
        ("COPA", [" I fell.", " it was old."]),
        ("ReCoRD", [" It was Ada who flew", " It was Bob who flew"]),
    ],
)
def test_the_option_is_what_it_adds_to_the_prompt(name, expected):
    task, sample = TASKS[name], small.samples(name)[0]
    encoded = Encoder(BYTES).options(task, sample)
    fulls = [task.full(sample, candidate) for candidate in sample.candidates]
    assert [read(one) for one in encoded] == [("<s>" + full, option) for full, option in zip(fulls, expected)]
    assert Encoder(BYTES).target(task, sample) == encoded[sample.gold[0]]


def test_a_generated_answer_is_trained_with_its_newline():
    sample = small.samples("SQuAD")[0]
    shown = "<s>Title: Tin\nContext: Tin melts.\nQuestion: What melts?\nAnswer:"
    assert read(Encoder(BYTES).target(SQUAD, sample)) == (shown + " Tin\n", " Tin\n")
    assert read(Encoder(BYTES).prompt(SQUAD, sample)) == (shown, "")


def test_the_protocols_lengths_with_a_real_tokenizer():
    tokenizer = small.tokenizer()
    for name in small.ROWS:
        for sample in small.samples(name):
            prompt = tokenizer.encode(TASKS[name].prompt(sample).strip(" "))
            for candidate, encoded in zip(sample.candidates, Encoder(tokenizer).options(TASKS[name], sample)):
                full = tokenizer.encode(TASKS[name].full(sample, candidate).strip(" "))
                assert encoded == Encoded(tuple(full), len(full) - len(prompt))


def test_white_space_at_the_ends():
    """Leading white space goes, trailing spaces go, a trailing newline stays."""
    sample = COPA.sample(
        {"premise": "\n It broke.", "choice1": "Yes  ", "choice2": "No", "question": "effect", "label": 0}
    )
    assert read(Encoder(BYTES).options(COPA, sample)[0]) == ("<s>It broke so yes", " yes")


def test_demonstrations_stand_in_front():
    first, second, third = small.samples("SQuAD")
    encoded = Encoder(BYTES).prompt(SQUAD, third, [first, second])
    assert read(encoded)[0] == (
        "<s>Title: Tin\nContext: Tin melts.\nQuestion: What melts?\nAnswer: Tin\n\n"
        "Title: Rome\nContext: It is old and wet.\nQuestion: How?\nAnswer: old and wet\n\n"
        "Title: A\nContext: B.\nQuestion: C?\nAnswer:"
    )
    first, second, _ = small.samples("SST-2")
    assert [read(one) for one in Encoder(BYTES).options(SST2, second, [first])] == [
        ("<s>a film of rare warmth It was great\n\ndull It was terrible", " terrible"),
        ("<s>a film of rare warmth It was great\n\ndull It was great", " great"),
    ]


def test_null_prompts():
    first, second, _ = small.samples("SST-2")
    encoder = Encoder(BYTES)
    assert [read(one) for one in encoder.null_options(SST2, second)] == [
        ("<s>It was terrible", " terrible"),
        ("<s>It was great", " great"),
    ]
    assert read(encoder.null_options(SST2, second, [first])[0]) == (
        "<s>a film of rare warmth It was great\n\nIt was terrible",
        " terrible",
    )
    assert [read(one) for one in encoder.null_options(TASKS["CB"], small.samples("CB")[0])] == [
        ("<s>Yes", "Yes"),
        ("<s>No", "No"),
        ("<s>Maybe", "Maybe"),
    ]


@pytest.mark.parametrize("room", [12, 25, 38, 39, 40, 2048])
def test_what_does_not_fit_is_cut_from_the_left_after_the_opening_token(room):
    sample = small.samples("SST-2")[0]
    encoded = Encoder(BYTES, max_length=room).options(SST2, sample)[0]
    text = "a film of rare warmth It was terrible"
    assert read(encoded) == ("<s>" + text[-(room - 1) :], " terrible")
    assert len(encoded.ids) == min(room, 1 + len(text))


def test_an_option_longer_than_the_room_keeps_what_can_be_predicted():
    encoded = Encoder(BYTES, max_length=5).options(SST2, small.samples("SST-2")[0])[0]
    assert read(encoded) == ("<s>ible", "ible")


def test_generation_leaves_room_for_the_answer_in_training_too():
    sample = small.samples("SQuAD")[0]
    encoder = Encoder(BYTES, max_length=40, max_new_tokens=10)
    assert len(encoder.prompt(SQUAD, sample).ids) == len(encoder.target(SQUAD, sample).ids) == 30
    with pytest.raises(ValueError, match="max_length=50 leaves no room for a prompt and max_new_tokens=50"):
        Encoder(BYTES, max_length=50).prompt(SQUAD, sample)


def test_the_opening_token_is_the_one_the_tokenizer_is_told():
    """A fast tokenizer goes on with the token that it was built with; the protocol changes OPT's."""
    tokenizer = small.tokenizer()
    assert Encoder(tokenizer).ids("It")[0] == tokenizer.eos_token_id == tokenizer.bos_token_id == 2
    tokenizer.bos_token = "<s>"
    assert tokenizer.encode("It")[0] == 2
    assert Encoder(tokenizer).ids("It") == (0, *tokenizer.encode("It")[1:])
    assert Encoder(tokenizer, max_length=3).options(SST2, small.samples("SST-2")[0])[0].ids[0] == 0


def test_a_tokenizer_that_opens_nothing_is_left_alone():
    tokenizer = small.tokenizer(opening=False)
    encoder = Encoder(tokenizer, max_length=4)
    assert Encoder(tokenizer).ids("It was great") == tuple(tokenizer.encode("It was great"))
    whole = Encoder(tokenizer).options(SST2, small.samples("SST-2")[0])[0]
    assert encoder.options(SST2, small.samples("SST-2")[0])[0].ids == whole.ids[-4:]


def test_what_ends_an_answer():
    tokenizer = small.tokenizer()
    assert Encoder(tokenizer).stops == (tokenizer.encode("\n")[-1], tokenizer.eos_token_id)
    assert Encoder(BYTES).stops == (10, 256)


def test_an_option_without_tokens_is_refused():
    row = {"premise": "It broke.", "choice1": "", "choice2": "No", "question": "effect", "label": 0}
    with pytest.raises(ValueError, match="COPA: with this tokenizer the option adds 0 tokens to its prompt"):
        Encoder(BYTES).options(COPA, COPA.sample(row))
    # a null prompt that is empty needs a token in front of the option
    sample = small.samples("CB")[0]
    with pytest.raises(ValueError, match="and 0 can be predicted"):
        Encoder(small.tokenizer(opening=False)).null_options(TASKS["CB"], sample)


def test_the_window_is_what_the_model_has_positions_for():
    assert window(small.model("opt", positions=128).config) == 128
    assert window(small.model("llama", positions=4096).config) == 2048
    assert window(object()) == 2048
