"""Policies: when they fire, what they refuse, and that their state survives."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cola import (
    ChainOptimizer,
    EpochKnots,
    EvenKnots,
    GapKnots,
    KnotPolicy,
    LinkConfig,
    NeverKnots,
    PlateauKnots,
    Signal,
    StepKnots,
)


def fires(policy, losses=None, steps=20, epochs=None):
    """Steps at which a policy asks for a knot; it is told of each, as the optimizer does."""
    found = []
    for step in range(1, (len(losses) if losses else steps) + 1):
        loss = None if losses is None else torch.tensor(losses[step - 1])
        epoch = None if epochs is None else epochs(step)
        if policy.update(Signal(step, epoch, loss)):
            policy.knotted(step)
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (NeverKnots(), []),
        (StepKnots(at=[3, 7, 19]), [3, 7, 19]),
        (StepKnots(every=6), [6, 12, 18]),
        (EpochKnots(at=[1, 3], steps_per_epoch=5), [5, 15]),
        (EvenKnots(length=1, total_steps=20), []),
        (EvenKnots(length=4, total_steps=20), [5, 10, 15]),
        (EvenKnots(length=3, total_steps=20), [7, 13]),
        (StepKnots(every=2) & StepKnots(every=3), [6, 12, 18]),
        (StepKnots(every=8) | StepKnots(at=[5, 8]), [5, 8, 16]),
        ((StepKnots(every=2) & StepKnots(every=3)) | StepKnots(at=[1]), [1, 6, 12, 18]),
    ],
    ids=repr,
)
def test_planned_knots(policy, expected):
    assert fires(policy) == expected


@given(length=st.integers(1, 12), extra=st.integers(0, 200))
def test_even_knots_make_that_many_links_of_nearly_equal_size(length, extra):
    total = length + extra
    at = [0, *fires(EvenKnots(length=length, total_steps=total), steps=total), total]
    sizes = [b - a for a, b in itertools.pairwise(at)]
    assert len(sizes) == length
    assert max(sizes) - min(sizes) <= 2
    assert min(sizes) >= 1
    assert at[1:-1] == [round(i * total / length) for i in range(1, length)]


def test_the_papers_chain_of_length_two_ties_after_epoch_three_of_five():
    assert fires(EpochKnots(at=[3], steps_per_epoch=100, total_epochs=5), steps=500) == [300]


def test_epochs_may_come_with_the_signals():
    assert fires(EpochKnots(at=[1, 2]), epochs=lambda step: (step - 1) / 6) == [7, 13]


class TestPlateau:
    def test_ties_when_the_loss_stops_improving(self):
        falling = [2.0 - 0.05 * i for i in range(20)]
        # windows of 2: eleven improve (the flat value is below the last falling mean), then 1 + patience do not
        assert fires(PlateauKnots(window=2, patience=2, threshold=1e-3), falling + [1.05] * 10) == [28]

    def test_judges_each_link_afresh(self):
        policy = PlateauKnots(window=1, patience=1)
        # first window sets the best, two more exhaust the patience, and again
        assert fires(policy, [1.0] * 9) == [3, 6, 9]

    def test_cooldown_and_max_links(self):
        assert fires(PlateauKnots(window=1, patience=1, cooldown=2), [1.0] * 12) == [3, 8]
        assert fires(PlateauKnots(window=1, patience=0, max_links=3), [1.0] * 12) == [2, 4]

    def test_mode_max(self):
        assert fires(PlateauKnots(mode="max", window=1, patience=1), [1.0, 2.0, 3.0, 3.0, 3.0]) == [5]
        assert fires(PlateauKnots(mode="min", window=1, patience=1), [1.0, 2.0, 3.0]) == [3]

    def test_threshold_is_relative(self):
        losses = [100 * 0.995**i for i in range(10)]
        assert fires(PlateauKnots(window=1, patience=1, threshold=0.001), losses) == []
        assert fires(PlateauKnots(window=1, patience=1, threshold=0.02), losses)[0] == 3

    def test_reads_the_device_once_per_window(self):
        reads = []

        def mean(losses):
            reads.append(len(losses))
            return losses.mean().item()

        policy = PlateauKnots(window=5)
        for step in range(1, 21):
            policy.update(Signal(step, None, torch.tensor(1.0 / step), mean))
        assert reads == [5, 5, 5, 5]

    def test_infinite_losses_are_left_out_and_all_infinite_windows_do_not_improve(self):
        assert fires(PlateauKnots(window=2, patience=1), [3.0, math.inf, 2.0, math.nan, 1.0, 1.0]) == []
        assert fires(PlateauKnots(window=1, patience=1), [3.0, math.inf, math.nan]) == [3]

    def test_a_knot_of_anyone_starts_a_new_link(self):
        policy = PlateauKnots(window=1, patience=2) | StepKnots(at=[3])
        assert fires(policy, [1.0] * 8) == [3, 7]

    def test_raises_when_no_loss_reaches_it(self):
        policy = PlateauKnots(window=4)
        with pytest.raises(RuntimeError, match=r"PlateauKnots has seen 4 steps .* no loss.*opt.observe\(loss\)"):
            fires(policy)


class TestProgress:
    """PlateauKnots without the options of its other rule."""

    def test_ties_when_a_link_progresses_at_less_than_half_its_best_rate(self):
        losses = [1.0, 0.9, 0.8, 0.7, 0.65, 0.6, 0.56, 0.52]
        # over three windows .3, .25, .2, .14: the last is below half of .3
        assert fires(PlateauKnots(window=1), losses) == [7]
        assert fires(PlateauKnots(window=1, share=0.7), losses) == [6]
        assert fires(PlateauKnots(window=1, mode="max"), [-loss for loss in losses]) == [7]

    def test_fires_while_the_loss_keeps_falling_and_judges_each_link_afresh(self):
        losses = [2 * 0.7**i for i in range(14)]
        assert fires(PlateauKnots(window=1), losses)[:2] == [6, 12]
        assert fires(PlateauKnots(window=1, threshold=1e-3), losses) == []

    def test_ties_nothing_in_a_steady_fall_and_at_once_when_the_loss_rises(self):
        assert fires(PlateauKnots(window=1), [2 - 0.01 * i for i in range(40)]) == []
        assert fires(PlateauKnots(window=1), [1 + 0.01 * i for i in range(12)]) == [5, 10]

    def test_leaves_the_last_link_as_many_steps_as_the_shortest_may_have(self):
        flat = [1.0] * 24
        assert fires(PlateauKnots(window=2, total_steps=24), flat) == [10]
        assert fires(PlateauKnots(window=2, patience=0, total_steps=24), flat) == [4, 8, 12, 16, 20]
        assert PlateauKnots(total_steps=3000).window == 30

    def test_under_noise_it_ties_about_every_six_windows(self):
        noise = torch.randn(1500, generator=torch.Generator().manual_seed(0))
        ties = fires(PlateauKnots(total_steps=1500), (2 - torch.arange(1500) / 1500 + noise).tolist())
        assert 10 <= len(ties) <= 19  # links have 75 steps or more
        assert ties[-1] <= 1500 - 75

    def test_a_cooldown_counts_in_the_shortest_link(self):
        losses = [2 * 0.97**i for i in range(100)]
        assert fires(PlateauKnots(window=5, cooldown=4, total_steps=100), losses)[-1] <= 100 - 45

    def test_windows_without_a_finite_loss_are_left_out(self):
        assert fires(PlateauKnots(window=1), [1.0, 0.9, math.nan, 0.8, 0.7, 0.6]) == []


class TestGap:
    @staticmethod
    def knots(policy, gradients):
        """The steps at which a policy ties that sees these gradients: of one factor, or dicts by layer."""
        found = []
        for step, gradient in enumerate(gradients, 1):
            by_path = gradient if isinstance(gradient, dict) else {"layer": gradient}
            own = {path: torch.as_tensor(values) for path, values in by_path.items()}
            live = SimpleNamespace(gradients=lambda own=own: own)
            if policy.update(Signal(step, opt=SimpleNamespace(live=live))):
                policy.knotted(step)
                found.append(step)
        return found

    def test_ties_when_the_gain_is_below_a_share_of_its_best(self):
        falling = [[2.0], [2.0], [1.6], [1.6], [1.2], [1.2]]
        # products per window of two: 4, (3.2 + 2.56) / 2, (1.92 + 1.44) / 2 < 4 / 2
        assert self.knots(GapKnots(window=2), falling) == [6]
        assert self.knots(GapKnots(window=2, share=0.8), falling) == [4]
        assert self.knots(GapKnots(window=2, total_steps=9), falling) == []

    def test_noise_is_no_gain(self):
        """Gradients of one norm, first parallel, then orthogonal."""
        parallel, orthogonal = [[1.0, 0.0]] * 3, [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
        assert self.knots(GapKnots(window=2), parallel + orthogonal) == [6]

    def test_gradients_of_different_layers_are_not_multiplied(self):
        alternating = [{"a": [1.0]}, {"b": [-1.0]}] * 6
        assert self.knots(GapKnots(window=2), alternating) == []
        # c alone is in all steps, with products as in the first test
        falling = [2.0, 2.0, 1.6, 1.6, 1.2, 1.2]
        mixed = [{"ab"[i % 2]: [1e3 * (-1.0) ** i], "c": [value]} for i, value in enumerate(falling)]
        assert self.knots(GapKnots(window=2), mixed) == [6]

    def test_without_any_gain_it_ties_nothing(self):
        assert self.knots(GapKnots(window=2), [[0.0]] * 12) == []
        assert self.knots(GapKnots(window=2), torch.full((12, 3), 1e-20, dtype=torch.float64)) == []

    def test_a_loaded_state_does_not_mix_gradients_of_two_runs(self):
        policy, other = GapKnots(window=2), GapKnots(window=2)
        self.knots(policy, [[5.0]])
        policy.load_state_dict(other.state_dict())
        assert self.knots(policy, [[1.0], [1.0], [1.0], [0.4], [0.4], [0.4]]) == [6]

    def test_it_ties_in_a_run(self):
        def chained():
            model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False))
            link = LinkConfig(r=2, target_modules="all-linear", train="B", init="selector")
            policy = GapKnots(share=0.9, window=3)
            return model, ChainOptimizer(torch.optim.SGD, model, policy, link=link, lr=0.02)

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, opt = chained()
        x, y = torch.eye(6), torch.ones(6, 3)
        for _ in range(30):
            (model(x) - y).square().mean().backward()
            opt.step()
            opt.zero_grad()
        assert 2 <= opt.policy.knots <= 5

    def test_needs_an_optimizer(self):
        with pytest.raises(RuntimeError, match=r"GapKnots needs signal\.opt"):
            GapKnots().update(Signal(1))


POLICIES = [
    lambda: PlateauKnots(window=2, total_steps=28),
    lambda: PlateauKnots(window=3, patience=1, cooldown=1),
    lambda: StepKnots(every=4) | PlateauKnots(window=2, patience=0),
    lambda: EpochKnots(at=[1, 2, 5], steps_per_epoch=4),
    lambda: StepKnots(at=[2, 9]) & EvenKnots(length=3, total_steps=27),
]


@pytest.mark.parametrize("make", POLICIES)
@given(cut=st.integers(0, 30), seed=st.integers(0, 1000))
def test_state_survives_at_any_step(make, cut, seed):
    losses = (torch.rand(30, generator=torch.Generator().manual_seed(seed)) * 0.2 + 1).tolist()
    whole, first, second = make(), make(), make()
    expected = fires(whole, losses)
    before = fires(first, losses[:cut]) if cut else []
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    after = []
    for step in range(cut + 1, 31):
        if second.update(Signal(step, None, torch.tensor(losses[step - 1]))):
            second.knotted(step)
            after.append(step)
    assert before + after == expected


class Patient(KnotPolicy):
    """A user's own, with state."""

    def __init__(self, n):
        self.n, self.seen = n, 0

    def update(self, signal):
        self.seen += 1
        return self.seen % self.n == 0


def test_a_policy_of_ones_own():
    assert fires(Patient(4)) == [4, 8, 12, 16, 20]
    half = Patient(4)
    fires(half, steps=6)
    other = Patient(4)
    other.load_state_dict(half.state_dict())
    assert other.seen == 6
    assert repr(other) == "Patient(n=4)"


def test_state_that_cannot_be_saved_is_named():
    policy = Patient(3)
    policy.model = object()
    with pytest.raises(TypeError, match=r"Patient\.model=<object.* cannot be saved"):
        policy.state_dict()


def test_state_of_another_policy_is_refused_and_changes_nothing():
    policy = StepKnots(every=3) | Patient(2)
    before = policy.state_dict()
    with pytest.raises(ValueError, match="the saved policy is PlateauKnots"):
        policy.load_state_dict({**before, "second": PlateauKnots().state_dict()})
    assert policy.state_dict() == before


BAD = [
    (lambda: StepKnots(), ValueError, r"StepKnots\(at=None, every=None\) needs one of"),
    (lambda: StepKnots(at=[1], every=2), ValueError, "needs one of"),
    (lambda: StepKnots(at=[]), ValueError, r"StepKnots\(at=\[\]\) needs a non-empty list of steps.*NeverKnots"),
    (lambda: StepKnots(at=[5, 3]), ValueError, r"StepKnots\(at=\[5, 3\]\) must be strictly increasing"),
    (lambda: StepKnots(at=[3, 3]), ValueError, "strictly increasing"),
    (lambda: StepKnots(at=[0, 3]), ValueError, r"at=0\) must be an integer of at least 1"),
    (lambda: StepKnots(at=[2.5]), ValueError, "must be an integer"),
    (lambda: StepKnots(at=5), ValueError, "non-empty list"),
    (lambda: StepKnots(at=[3, 10], total_steps=10), ValueError, r"has a knot beyond the run: step 10 of 10"),
    (lambda: StepKnots(every=0), ValueError, "every=0"),
    (lambda: StepKnots(every=10, total_steps=10), ValueError, "ties nothing in a run"),
    (lambda: EpochKnots(at=[]), ValueError, "non-empty list of epochs"),
    (lambda: EpochKnots(at=[5], steps_per_epoch=3, total_epochs=5), ValueError, "beyond the run: epoch 5 of 5"),
    (lambda: EpochKnots(at=[1], steps_per_epoch=0), ValueError, "steps_per_epoch=0"),
    (lambda: fires(EpochKnots(at=[1])), RuntimeError, "EpochKnots does not know the epoch: give steps_per_epoch"),
    (lambda: EvenKnots(length=0, total_steps=5), ValueError, "length=0"),
    (lambda: EvenKnots(length=6, total_steps=5), ValueError, "a link needs at least one step"),
    (lambda: PlateauKnots(mode="best"), ValueError, "mode='best'.*'min' or 'max'"),
    (lambda: PlateauKnots(patience=-1), ValueError, "patience=-1"),
    (lambda: PlateauKnots(threshold=2.0), ValueError, "threshold=2.0"),
    (lambda: PlateauKnots(window=0), ValueError, "window=0"),
    (lambda: PlateauKnots(max_links=0), ValueError, "max_links=0"),
    (lambda: PlateauKnots(share=1.0), ValueError, r"share=1.0\) must be between 0 and 1"),
    (lambda: PlateauKnots(share=0.5, patience=2), ValueError, r"share=0.5, patience=2, threshold=None\) mixes two"),
    (lambda: PlateauKnots(total_steps=0), ValueError, "total_steps=0"),
    (lambda: GapKnots(share=0), ValueError, r"GapKnots\(share=0\) must be between 0 and 1"),
    (lambda: GapKnots(window=0), ValueError, r"GapKnots\(window=0\)"),
    (lambda: StepKnots(every=2) | 3, TypeError, "cannot combine a knot policy with 3"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_policies(make, error, message):
    with pytest.raises(error, match=message):
        make()
