"""What a user adds from outside the package: a policy that sees gradients, a reset of the base's state of one's own."""

import copy

import pytest
import torch

from cola import (
    AdaptedLayer,
    ChainOptimizer,
    KnotError,
    KnotPolicy,
    LinkConfig,
    NeverKnots,
    StepKnots,
    register_kind,
)
from cola.lora.kinds import KINDS
from tests.models import BODY, Net, train


def wrap(model, policy=None, base=torch.optim.AdamW, r=2, **kwargs):
    link = LinkConfig(r=r, target_modules=BODY)
    return ChainOptimizer(base, model, policy or StepKnots(at=[3]), link=link, lr=0.02, **kwargs)


def states(opt):
    """Copies of the base's state for the factors, in their order."""
    return [copy.deepcopy(opt.base.state[p]) for p in opt.param_groups[0]["params"] if p in opt.base.state]


def same(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
        for a, b in zip(first, second)
    )


# a policy


class WhenTheGradientIsSmall(KnotPolicy):
    """Ties when the live link's gradient is below a share of its largest."""

    def __init__(self, share):
        self.share, self.largest = share, 0.0
        self._norms = []

    def update(self, signal):
        grads = [p.grad for p in signal.opt.param_groups[0]["params"] if p.grad is not None]
        self._norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())
        self.largest = max(self.largest, self._norms[-1])
        return self._norms[-1] < self.share * self.largest


def test_a_policy_reads_the_live_links_gradient():
    model = Net()
    opt = wrap(model, WhenTheGradientIsSmall(0.8))
    train(opt, model, 8)
    norms = opt.policy._norms
    wanted = [i + 1 for i, norm in enumerate(norms) if norm < 0.8 * max(norms[: i + 1])]
    assert [link.step for link in opt.chain] == wanted
    assert wanted


def test_a_policy_that_holds_the_optimizer_does_not_copy_it_when_a_state_is_loaded(tmp_path):
    class Holds(KnotPolicy):
        def update(self, signal):
            self._opt, self._model = signal.opt, signal.opt.model
            return signal.step == 2

    class Uncopied(Net):
        def __deepcopy__(self, memo):
            raise AssertionError("the model is copied")

    model = Uncopied()
    opt = wrap(model, Holds())
    train(opt, model, 3)
    opt.load_state_dict(opt.state_dict())
    assert opt.policy._opt is opt


def test_attributes_with_an_underscore_are_no_state(tmp_path):
    model = Net()
    opt = wrap(model, WhenTheGradientIsSmall(0.0))
    train(opt, model, 2)
    opt.policy._thing = object()  # nothing that JSON could hold
    assert opt.policy.state_dict() == {
        "policy": "WhenTheGradientIsSmall", "share": 0.0, "largest": opt.policy.largest,
    }  # fmt: skip
    opt.save(tmp_path)
    resumed = wrap(Net(), WhenTheGradientIsSmall(0.0))
    resumed.load(tmp_path)
    assert resumed.policy.largest == opt.policy.largest
    assert resumed.policy._norms == []
    assert "_thing" not in repr(opt.policy)


# a reset


def keep_half(base, old, new):
    """Halves what the base remembers."""
    for pair in new.values():
        for parameter in pair:
            for value in base.state[parameter].values():
                value.mul_(0.5)


def forget(base, old, new):
    """Drops the factors' state, as the base itself would start."""
    for pair in new.values():
        for parameter in pair:
            base.state.pop(parameter, None)


@pytest.mark.parametrize(
    ("reset", "factor"),
    [("state", None), (forget, None), ("keep", 1.0), (lambda base, old, new: None, 1.0), (keep_half, 0.5)],
)
@pytest.mark.parametrize("base", [torch.optim.AdamW, lambda groups, lr: torch.optim.SGD(groups, lr, momentum=0.9)])
def test_what_becomes_of_the_bases_state_at_a_knot(reset, factor, base):
    model = Net()
    opt = wrap(model, NeverKnots(), base, reset=reset)
    train(opt, model, 3)
    before = states(opt)
    weight = model.first.weight.clone()
    opt.tie()
    assert not torch.equal(model.first.weight, weight)
    if factor is None:
        assert states(opt) == []
    else:
        assert same(states(opt), [{k: v * factor for k, v in state.items()} for state in before])
    train(opt, model, 2, start=3)
    opt.finish()
    assert len(opt.chain) == 2


def test_a_function_gets_the_old_factors_and_the_new_parameters():
    seen = []

    def look(base, old, new):
        assert base is opt.base
        for path, layer in opt.live.layers.items():
            assert new[path][0] is layer.lora_A
            assert new[path][1] is layer.lora_B
            assert not new[path][1].any()
        seen.append({path: (A.clone(), B.clone()) for path, (A, B) in old.items()})

    model = Net()
    opt = wrap(model, NeverKnots(), reset=look)
    train(opt, model, 2)
    factors = {path: (layer.lora_A.clone(), layer.lora_B.clone()) for path, layer in opt.live.layers.items()}
    opt.tie()
    opt.finish()
    assert len(seen) == 1  # the last tie begins no link
    assert all(torch.equal(a, b) for path in factors for a, b in zip(seen[0][path], factors[path]))


def test_a_function_that_fails_changes_nothing():
    def fail(base, old, new):
        keep_half(base, old, new)
        base.state.clear()
        raise ArithmeticError("mine")

    model = Net()
    opt = wrap(model, NeverKnots(), reset=fail)
    train(opt, model, 2)
    before, weights = states(opt), copy.deepcopy(model.state_dict())
    with pytest.raises(ArithmeticError, match="mine"):
        opt.tie()
    assert same(states(opt), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert len(opt.chain) == 0
    opt.reset = "state"
    opt.tie()


def test_what_a_function_did_to_the_rest_of_the_base_is_undone_if_it_fails():
    def fail(base, old, new):
        base.state.clear()
        for group in base.param_groups:
            group["lr"], group["mine"] = 5.0, 1
        raise ArithmeticError("mine")

    model = Net()
    link = LinkConfig(r=2, target_modules=BODY, modules_to_save=["head"])
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=link, lr=0.02, reset=fail)
    train(opt, model, 2)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ArithmeticError, match="mine"):
        opt.tie()
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert same(*([state["state"][i] for i in sorted(state["state"])] for state in (before, after)))


def test_a_function_that_writes_to_the_new_factors_is_refused():
    def write(base, old, new):
        for _, B in new.values():
            B.detach().fill_(1.0)

    model = Net()
    opt = wrap(model, NeverKnots(), reset=write)
    train(opt, model, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="reset=write has written to the new link's factors"):
        opt.tie()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("reset", ["keep", keep_half])
def test_a_run_with_a_reset_of_its_own_is_resumed_bit_for_bit(reset, tmp_path):
    whole = Net()
    train(wrap(whole, reset=reset), whole, 6)
    model, resumed = Net(), Net()
    opt = wrap(model, reset=reset)
    train(opt, model, 4)
    opt.save(tmp_path)
    again = wrap(resumed, reset=reset)
    again.load(tmp_path)
    train(again, resumed, 2, start=4)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    with pytest.raises(ValueError, match="reset differs"):
        wrap(Net()).load(tmp_path)


def schedule_free(groups, lr):
    return pytest.importorskip("schedulefree").AdamWScheduleFree(groups, lr)


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({"reset": "moments"}, ValueError, r"reset=.moments. is unknown: choose one of state, keep, transport"),
        ({"reset": 3}, TypeError, "reset=3 must be one of"),
        ({"reset": "keep", "r": (2, 1)}, ValueError, r"reset='keep' needs links of one rank, and r=\(2, 1\)"),
        ({"reset": "keep", "base": schedule_free}, ValueError, "is not possible with AdamWScheduleFree"),
    ],
)
def test_a_reset_that_cannot_be_is_refused_before_anything_changes(kwargs, kind, message):
    model = Net()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(kind, match=message):
        wrap(model, **kwargs)
    assert before == {name: type(module) for name, module in model.named_modules()}


def test_state_is_not_kept_over_a_rank_that_a_callable_changes():
    model = Net()
    opt = wrap(model, NeverKnots(), r=lambda link: 2 - link, reset="keep")
    train(opt, model, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KnotError, match=r"layer 'first' goes from 2 to 1: use reset='state'"):
        opt.tie()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# an extra entry in a checkpoint


class Average:
    """An average of a model's weights, which a run is to go on with."""

    def __init__(self):
        self.steps, self.mean = 0, torch.zeros(3)

    def state_dict(self):
        return {"steps": self.steps, "mean": self.mean}

    def load_state_dict(self, state):
        self.steps, self.mean = state["steps"], state["mean"].clone()


@pytest.mark.parametrize("way", ["directory", "state dict"])
def test_an_extra_entry_is_saved_with_a_run_and_comes_back(way, tmp_path):
    model, average = Net(), Average()
    opt = wrap(model)
    opt.register_for_checkpointing("average", average)
    train(opt, model, 4)
    average.steps, average.mean = 4, torch.tensor([1.0, -2.0, 0.5])
    resumed, again = Net(), Average()
    other = wrap(resumed)
    other.register_for_checkpointing("average", again)
    if way == "directory":
        opt.save(tmp_path)
        other.load(tmp_path)
    else:
        torch.save(opt.state_dict(), tmp_path / "state.pt")
        resumed.load_state_dict(model.state_dict())
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.steps == 4
    assert torch.equal(again.mean, average.mean)
    with pytest.raises(ValueError, match=r"the saved run has the extra entries \['average'\], and here \[\]"):
        wrap(Net()).load_state_dict(opt.state_dict())


def test_an_extra_entry_that_cannot_be_loaded_leaves_a_whole_run(tmp_path):
    class Fails(Average):
        def load_state_dict(self, state):
            raise ArithmeticError("mine")

    model, resumed = Net(), Net()
    opt, other = wrap(model), wrap(resumed)
    opt.register_for_checkpointing("average", Average())
    other.register_for_checkpointing("average", Fails())
    train(opt, model, 4)
    opt.save(tmp_path)
    with pytest.raises(ArithmeticError, match="mine"):
        other.load(tmp_path)
    train(opt, model, 2, start=4), train(other, resumed, 2, start=4)
    opt.finish(), other.finish()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("way", ["save", "state_dict"])
def test_an_extra_entry_that_only_pickling_could_keep_is_named(way, tmp_path):
    average, opt = Average(), wrap(Net())
    average.steps = object()
    opt.register_for_checkpointing("average", average)
    with pytest.raises(TypeError, match=r"extra/average/steps is a object .* let state_dict\(\) return numbers"):
        opt.save(tmp_path) if way == "save" else opt.state_dict()


def test_an_extra_entry_that_a_framework_drops_is_mentioned(caplog):
    model = Net()
    opt = wrap(model)
    opt.register_for_checkpointing("average", Average())
    train(opt, model, 2)
    state = {name: value for name, value in opt.state_dict().items() if name != "cola"}
    opt.load_state_dict(state)
    assert "the saved state has no entries for average, which stay as they are" in caplog.text


@pytest.mark.parametrize(
    ("name", "thing", "kind", "message"),
    [
        (1, Average(), TypeError, "name=1 must be a string"),
        ("a", object(), TypeError, "must have state_dict"),
        ("taken", Average(), ValueError, "name='taken' is registered already"),
    ],
)
def test_an_entry_that_cannot_be_registered_is_refused(name, thing, kind, message):
    opt = wrap(Net())
    opt.register_for_checkpointing("taken", Average())
    with pytest.raises(kind, match=message):
        opt.register_for_checkpointing(name, thing)


# a kind of layer


class Gain(torch.nn.Module):
    """A user's own linear map: ``g·W x``."""

    def __init__(self):
        super().__init__()
        self.weight, self.gain = torch.nn.Parameter(torch.eye(6) / 2), 0.5

    def forward(self, x):
        return self.gain * (x @ self.weight.t())


class GainWithLink(AdaptedLayer):
    plain_class = Gain

    def forward(self, x):
        return Gain.forward(self, x) + self.gain * self.link(x)


@pytest.fixture
def gain_is_known():
    register_kind(GainWithLink)
    yield
    KINDS.remove(GainWithLink)


@pytest.mark.usefixtures("gain_is_known")
@pytest.mark.parametrize("targets", ["all-linear", ["1"]])
def test_a_users_own_kind_of_layer_carries_a_chain(targets, tmp_path):
    def body():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 6), Gain(), torch.nn.Tanh(), torch.nn.Linear(6, 1))

    def made():
        model = body()
        link = LinkConfig(r=1, target_modules=targets)
        return model, ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=link, lr=0.05)

    def steps(model, opt, count):
        for _ in range(count):
            model(torch.ones(3, 6)).square().mean().backward()
            opt.step()
            opt.zero_grad()

    model, opt = made()
    plain = body()
    assert opt.coverage().layers == (3 if targets == "all-linear" else 1)
    steps(model, opt, 3)
    opt.save(tmp_path)
    resumed, again = made()
    again.load(tmp_path)
    steps(model, opt, 2), steps(resumed, again, 2)
    opt.finish(), again.finish()
    assert type(model[1]) is Gain
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in model.state_dict().items())
    opt.chain.apply(plain)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_kind_that_cannot_be_is_refused():
    with pytest.raises(TypeError, match=r"needs a subclass of cola\.AdaptedLayer"):
        register_kind(Gain)
    with pytest.raises(TypeError, match="must set plain_class"):
        register_kind(type("Nameless", (AdaptedLayer,), {}))
