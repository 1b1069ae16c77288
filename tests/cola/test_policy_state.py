"""What a policy's saved state may hold: senseless values are refused by name, before anything changes."""

import copy
import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cola
from cola import (
    ChainOptimizer,
    EpochKnots,
    EvenKnots,
    GapKnots,
    KnotPolicy,
    LinkConfig,
    NeverKnots,
    PlateauKnots,
    StepKnots,
)
from cola.policies import Signal
from tests.cola.chain.json_places import places, replaced
from tests.models import BODY, Net, train

NO_COUNT = [-1, 0.5, 3.0, "3", None, True, math.nan, math.inf, [], [3], {}]
NO_NUMBER = ["0.1", True, math.nan, [], [0.1], {}]
NO_LIST = ["12", "", 3, 0.5, True, math.nan, [], {}, {"a": 1}, [0], [-1], [2, 1], [2, 2], [1.5], ["1"], [None], [[1]]]
NO_VALUES = [None, "1.0", 1.0, {}, [1], [None], ["1.0"], [True], [[1.0]], [1.0] * 9]


def but(values, *accepted):
    return [value for value in values if not any(value is a or value == a for a in accepted)]


#: policy -> (how it is made, entry -> what it cannot be); every entry of every built-in policy
TABLE = {
    NeverKnots: (NeverKnots, {}),
    StepKnots: (
        lambda: StepKnots(at=[3, 9]),
        {"at": [*NO_LIST, None], "every": [*but(NO_COUNT, None), 0, 2]},  # one of the two
    ),
    EpochKnots: (
        lambda: EpochKnots(at=[1, 2], steps_per_epoch=4),
        {"at": [*NO_LIST, None], "steps_per_epoch": [*but(NO_COUNT, None), 0], "done": NO_COUNT},
    ),
    EvenKnots: (
        lambda: EvenKnots(length=3, total_steps=9),
        {"length": [*NO_COUNT, 0, 10], "total_steps": [*NO_COUNT, 0, 2]},
    ),
    PlateauKnots: (
        lambda: PlateauKnots(window=4, patience=1, cooldown=2, max_links=5),
        {
            "mode": ["best", "", None, 0, [], {}, ["min"]],
            "patience": NO_COUNT,
            "threshold": [*NO_NUMBER, None, -0.1, 1, 10**400, math.inf],
            "window": [*NO_COUNT, 0],
            "cooldown": NO_COUNT,
            "max_links": [*but(NO_COUNT, None), 0],
            "best": [*NO_NUMBER, 10**400],
            "bad_windows": NO_COUNT,
            "cooling": NO_COUNT,
            "knots": NO_COUNT,
            "steps_in_window": NO_COUNT,
            "values": NO_VALUES,
            "means": [None, "1.0", 1.0, {}, [None], ["1.0"], [True], [[1.0]], [math.nan], [1.0] * 9],
            "deaf_steps": [*but(NO_COUNT, -1), -2],
            "share": [*but(NO_NUMBER, None), 0.5],  # the other rule's
            "total_steps": [*but(NO_COUNT, None), 0],
        },
    ),
    GapKnots: (
        lambda: GapKnots(window=4, cooldown=2, max_links=5, total_steps=90),
        {
            "share": [*NO_NUMBER, None, 0, 1, -0.1, math.inf],
            "window": [*NO_COUNT, 0],
            "cooldown": NO_COUNT,
            "max_links": [*but(NO_COUNT, None), 0],
            "total_steps": [*but(NO_COUNT, None), 0],
            "best": [*NO_NUMBER, 10**400],
            "cooling": NO_COUNT,
            "knots": NO_COUNT,
            "steps_in_window": NO_COUNT,
            "values": NO_VALUES,
        },
    ),
}
MAKERS = {
    **{kind.__name__: make for kind, (make, _) in TABLE.items()},
    "StepKnots every": lambda: StepKnots(every=3),
    "EpochKnots told": lambda: EpochKnots(at=[1, 2]),
    "PlateauKnots max": lambda: PlateauKnots(mode="max", window=2),
    "PlateauKnots loss": lambda: PlateauKnots(window=2, threshold=0.1),
    "either": lambda: StepKnots(every=4) | PlateauKnots(window=2, patience=0),
    "both": lambda: EpochKnots(at=[1, 2], steps_per_epoch=4) & (NeverKnots() | EvenKnots(length=3, total_steps=9)),
}


class Live:
    """The part of an optimizer that a policy reads."""

    def __init__(self, step):
        self.live, self.step = self, step

    def gradients(self):
        return {"layer": torch.full((2, 3), 1.0 / self.step)}


def run(policy, first=1, last=6):
    for step in range(first, last + 1):
        if policy.update(Signal(step, step / 4, torch.tensor(1.0 / step), opt=Live(step))):
            policy.knotted(step)
    return policy


def test_the_table_has_every_entry_of_every_built_in_policy():
    public = {value for value in vars(cola).values() if isinstance(value, type) and issubclass(value, KnotPolicy)}
    assert public - {KnotPolicy} == set(TABLE)
    for make, entries in TABLE.values():
        assert make().state_dict().keys() - {"policy"} == set(entries)


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
def test_senseless_values_are_refused_with_policy_entry_and_value_and_nothing_changes(kind):
    make, entries = TABLE[kind]
    saved = run(make()).state_dict()
    for name, values in entries.items():
        for value in values:
            policy = run(make(), last=3)
            before = policy.state_dict()
            with pytest.raises(ValueError, match=rf"the saved policy is damaged: {kind.__name__}\(") as caught:
                policy.load_state_dict({**saved, name: value})
            # a list's senseless item is shown alone
            shown = [value, *(value if isinstance(value, (list, dict)) else ())]
            assert any(f"{name}={item!r:.40}" in str(caught.value) for item in shown)
            assert policy.state_dict() == before


@pytest.mark.parametrize("name", MAKERS)
def test_missing_and_unknown_entries_are_named(name):
    saved = run(MAKERS[name]()).state_dict()
    for entry in saved.keys() - {"policy"}:
        policy = MAKERS[name]()
        before = policy.state_dict()
        with pytest.raises(ValueError, match=rf"the saved policy {saved['policy']} lacks '{entry}'"):
            policy.load_state_dict({key: value for key, value in saved.items() if key != entry})
        assert policy.state_dict() == before
    with pytest.raises(ValueError, match=rf"the saved policy {saved['policy']} has 'extra'"):
        MAKERS[name]().load_state_dict({**saved, "extra": 7})
    for state in (None, [], "x", 3, {}, {**saved, "policy": None}):
        with pytest.raises(ValueError, match=r"the saved policy is damaged: a \w+ without a name, not a state of "):
            MAKERS[name]().load_state_dict(state)


@pytest.mark.parametrize("name", MAKERS)
def test_values_too_deep_to_be_shown_are_refused_too(name):
    for entry, depth in itertools.product(MAKERS[name]().state_dict(), (200, *range(900, 1000, 3))):
        deep: list = []
        for _ in range(depth):
            deep = [deep]
        with pytest.raises(ValueError, match="the saved policy is damaged"):
            MAKERS[name]().load_state_dict({**MAKERS[name]().state_dict(), entry: deep})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("name", MAKERS)
@given(data=st.data(), cut=st.integers(0, 6))
def test_any_json_in_any_place_is_refused_or_harmless(name, data, cut):
    """ValueError and nothing changed, or a policy that goes on and whose state is good again."""
    state = run(MAKERS[name](), last=cut).state_dict()
    path = data.draw(st.sampled_from([path for path in places(state) if path]))
    state = replaced(state, path, data.draw(JSON))
    state = json.loads(json.dumps(state))
    given_state, policy = copy.deepcopy(state), MAKERS[name]()
    before = policy.state_dict()
    try:
        policy.load_state_dict(state)
    except ValueError:
        assert policy.state_dict() == before
        return
    run(policy, cut + 1, cut + 12)
    assert repr(state) == repr(given_state)  # shared with nobody
    MAKERS[name]().load_state_dict(policy.state_dict())


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan, 3e38])
def test_what_an_exploding_run_saves_can_be_loaded(loss):
    """Windows of such losses overflow or have no mean at all."""
    for steps in range(1, 7):
        policy = PlateauKnots(window=3, patience=5)
        for step in range(1, steps + 1):
            policy.update(Signal(step, None, torch.tensor(loss)))
        saved = json.loads(json.dumps(policy.state_dict()))
        other = PlateauKnots(window=3, patience=5)
        other.load_state_dict(saved)
        assert repr(other.state_dict()) == repr(saved)


def test_what_was_changed_by_hand_during_a_run_can_be_loaded():
    """Attributes are public: a run may shorten its cooldown while it lasts, or the list of its knots."""
    plateau, epochs = run(PlateauKnots(window=1, patience=0, cooldown=4), last=3), run(EpochKnots(at=[1, 2, 3]), last=9)
    plateau.cooldown, plateau.cooling, epochs.at = 0, 4, [1]
    for policy, fresh in ((plateau, PlateauKnots(window=1)), (epochs, EpochKnots(at=[1]))):
        fresh.load_state_dict(policy.state_dict())
        assert fresh.state_dict() == policy.state_dict()
        run(fresh, 10, 20)


class Popped(StepKnots):
    """Uses up the list it inherits, and adds an entry of its own."""

    def __init__(self):
        super().__init__(at=[2])
        self.at = []
        self.patience = 1.5


def test_a_users_subclass_has_values_of_its_own():
    fresh = Popped()
    fresh.load_state_dict({**Popped().state_dict(), "patience": 2.5})
    assert fresh.patience == 2.5


def test_a_pair_that_is_refused_has_changed_neither():
    pair = PlateauKnots(cooldown=1) | StepKnots(every=3)
    before, first = pair.state_dict(), pair.first
    other = (PlateauKnots(cooldown=2) | StepKnots(every=4)).state_dict()
    other["second"]["every"] = -1
    with pytest.raises(ValueError, match=r"StepKnots\(every=-1\)"):
        pair.load_state_dict(other)
    assert pair.state_dict() == before
    assert pair.first is first


def test_an_optimizer_refuses_such_a_state_before_anything_changes(tmp_path):
    def wrap(model):
        link = LinkConfig(r=1, target_modules=BODY)
        return ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2) | PlateauKnots(), link=link, lr=0.02)

    model = Net()
    opt = wrap(model)
    train(opt, model, 3)
    opt.policy.second.bad_windows = -4
    opt.save(tmp_path)
    state = opt.state_dict()
    for load in (lambda other: other.load(tmp_path), lambda other: other.load_state_dict(state)):
        fresh = Net()
        other = wrap(fresh)
        weights, before = copy.deepcopy(fresh.state_dict()), repr(other.state_dict())
        with pytest.raises(ValueError, match=r"PlateauKnots\(bad_windows=-4\) must be an integer of at least 0"):
            load(other)
        assert repr(other.state_dict()) == before
        assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in weights.items())


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_shown_are_the_settings_which_no_step_changes(name):
    assert repr(run(MAKERS[name]())) == repr(MAKERS[name]())
