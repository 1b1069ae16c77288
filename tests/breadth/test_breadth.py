"""Architectures of transformers, made tiny: a chain holds on each, or is refused with a reason.

`python -m tests.breadth` measures all of them. The tests repeat those that are refused, and every third of the rest.
"""

import pytest

from tests.breadth import page

FOUND = page.load()
MODELS = FOUND["models"]
TRIED = [name for name, one in MODELS.items() if "skipped" not in one]
REFUSED = [name for name in TRIED if any(MODELS[name][key].startswith("refused") for key in page.COLUMNS.values())]
REPEATED = REFUSED + [name for name in TRIED if name not in REFUSED][::3]


def test_the_page_shows_what_was_measured():
    assert page.PAGE.read_text() == page.render(FOUND), "run python -m tests.breadth"


def test_nothing_is_wrong_and_every_refusal_has_a_reason():
    for name in TRIED:
        for key in page.COLUMNS.values():
            outcome = MODELS[name][key]
            assert outcome in ("holds", "-") or outcome.startswith("refused: "), (name, key, outcome)


def test_most_architectures_are_tried_and_hold():
    assert len(TRIED) >= 339
    assert sum(MODELS[name]["all-linear"] == "holds" for name in TRIED) >= 0.95 * len(TRIED)


def test_every_kind_of_layer_is_held_by_all_its_architectures():
    for kind, least in {
        "fused experts": 60,
        "embeddings": 300,
        "convolutions": 150,
        "nn.MultiheadAttention": 10,
    }.items():
        mine = [one["all"] for one in MODELS.values() if kind in one.get("kinds", "").split(", ")]
        assert len(mine) >= least
        assert set(mine) == {"holds"}


def same_versions():
    import peft
    import transformers

    return (transformers.__version__, peft.__version__) == (FOUND["transformers"], FOUND["peft"])


@pytest.mark.long
def test_the_list_is_complete():
    pytest.importorskip("transformers")
    from tests.breadth.tiny import architectures

    if not same_versions():
        pytest.skip("measured with other versions")
    assert {name: one["kind"] for name, one in MODELS.items()} == architectures()


@pytest.mark.long
@pytest.mark.parametrize("name", REPEATED)
def test_architecture(name):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tests.breadth.outcomes import Untried, outcomes

    try:
        found = outcomes(name)
    except (Untried, AttributeError):  # another version's configuration, or none of this name
        if same_versions():
            raise
        pytest.skip("cannot be built with these versions")
    expected = {key: outcome for key, outcome in MODELS[name].items() if key != "kind"}
    short = {key: page.short(outcome) for key, outcome in found.items()}
    if same_versions():
        assert short == expected
    else:
        assert not [outcome for outcome in short.values() if outcome.startswith("wrong")]
