"""What a user adds from outside the package: a policy that sees gradients, a reset of the base's state of one's own."""

import copy

import pytest
import torch

from cola import (
    AdaptedLayer,
    Chain,
    ChainOptimizer,
    KnotError,
    KnotPolicy,
    LinkConfig,
    NeverKnots,
    StepKnots,
    register_kind,
)
from cola.chain.spectrum import stack
from cola.lora.kinds import KINDS
from tests.models import BODY, Net, loss_of, train


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


def test_a_start_that_is_refused_is_refused_before_the_reset_is_called():
    calls = []

    def init(start):
        A, B = random_pair(start)
        return A, B * (1e6 if start.link else 1)

    model = Net(dtype=torch.float16)
    link = LinkConfig(r=2, target_modules=BODY, init=init)
    opt = ChainOptimizer(
        torch.optim.SGD, model, NeverKnots(), link=link, lr=0.02, reset=lambda base, old, new: calls.append(1)
    )
    train(opt, model, 2, dtype=torch.float16)
    with pytest.raises(KnotError, match="cannot start"):
        opt.tie()
    assert not calls


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


# an init


def by_principal_directions(start):
    """A starts from the weight's leading right singular vectors, B from nothing."""
    assert start.shape == WEIGHTS[start.path].shape
    return torch.linalg.svd(WEIGHTS[start.path]).Vh[: start.rank]


def pissa(start):
    """The weight's leading part is trained, and what is left of the weight is frozen."""
    U, values, Vh = torch.linalg.svd(WEIGHTS[start.path])
    root = (values[: start.rank] / start.scaling).sqrt()
    return root[:, None] * Vh[: start.rank], U[:, : start.rank] * root


def by_the_gradient(start):
    """A starts from the directions of the live link's gradient; the first link has none before it."""
    if start.opt is None:
        return torch.randn(start.rank, start.shape[1], generator=start.generator)
    return start.opt.live.layers[start.path].lora_A.grad.clone() * 100


def random_pair(start):
    """Both factors drawn."""
    out, inner = start.shape
    A = torch.randn(start.rank, inner, generator=start.generator)
    return A, torch.randn(out, start.rank, generator=start.generator) / 8


WEIGHTS = {path: weight.detach().clone() for path, weight in Net().named_parameters()}
WEIGHTS = {path.removesuffix(".weight"): weight for path, weight in WEIGHTS.items() if path.endswith(".weight")}
INITS = [by_principal_directions, pissa, by_the_gradient, random_pair, "two-sided"]


@pytest.mark.parametrize("init", INITS)
def test_a_link_starts_where_a_function_says_and_the_model_stays_the_same(init):
    model = Net().double()
    before = loss_of(model, 0, torch.float64).item()
    link = LinkConfig(r=2, target_modules=BODY, init=init)
    opt = ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=link, lr=0.02)
    # the factors are rounded to float64 like the weights, so the function is kept to a few roundings
    assert loss_of(model, 0, torch.float64).item() == pytest.approx(before, rel=1e-12)
    for path, layer in opt.live.layers.items():
        assert bool(layer.lora_B.any()) == (init in (pissa, random_pair, "two-sided")), path
    train(opt, model, 2, dtype=torch.float64)
    tied = loss_of(model, 1, torch.float64).item()
    loss_of(model, 1, torch.float64).backward()
    opt.tie()
    assert loss_of(model, 1, torch.float64).item() == pytest.approx(tied, rel=1e-12)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_record_of_links_that_start_anywhere_gives_the_run_back_bit_for_bit(init, rounding, dtype, tmp_path):
    def made():
        model = Net().to(dtype)
        link = LinkConfig(r=2, target_modules=BODY, init=init)
        return model, ChainOptimizer(
            torch.optim.SGD, model, StepKnots(at=[2, 4]), link=link, rounding=rounding, lr=0.02
        )

    model, opt = made()
    train(opt, model, 7, dtype=dtype)
    opt.finish()
    fresh = Net().to(dtype)
    opt.chain.save(tmp_path / "chain")
    Chain.load(tmp_path / "chain").apply(fresh)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
    for stop in (0, 1, 4):  # before the first step, in a link, at a knot
        for way in ("directory", "state dict"):
            part, first = made()
            train(first, part, stop, dtype=dtype)
            resumed, second = made()
            if way == "directory":
                first.save(tmp_path / f"{stop}")
                second.load(tmp_path / f"{stop}")
            else:
                resumed.load_state_dict(part.state_dict())
                second.load_state_dict(first.state_dict())
            train(second, resumed, 7 - stop, start=stop, dtype=dtype)
            second.finish()
            same_weights = [torch.equal(v, resumed.state_dict()[name]) for name, v in model.state_dict().items()]
            assert all(same_weights), (stop, way)
            assert [link.report.delta_norm for link in second.chain] == [link.report.delta_norm for link in opt.chain]
            assert [link.report.lost_norm for link in second.chain] == [link.report.lost_norm for link in opt.chain]


def test_a_link_that_starts_at_a_product_is_exported_and_undone():
    model = Net()
    opt = wrap_init(model, random_pair)
    train(opt, model, 6)
    opt.finish()
    for path in opt.chain.layers():
        total = model.get_submodule(path).weight.double() - WEIGHTS[path].double()
        # the weights are rounded 4 times on the way
        assert torch.allclose(opt.chain.delta(path), total, atol=4 * torch.finfo(torch.float32).eps * 8)
        left, right = stack([link.factors[path] for link in opt.chain])
        assert torch.allclose(left @ right, opt.chain.delta(path))
    undone = Net()
    opt.chain.apply(undone, upto=1)
    opt.chain.undo(model, Net())
    assert all(torch.equal(value, undone.state_dict()[name]) for name, value in model.state_dict().items())


def test_an_init_is_given_the_optimizer_by_all_links_but_the_first():
    seen = []

    def init(start):
        seen.append((start.link, start.opt))
        return random_pair(start)

    model = Net()
    opt = wrap_init(model, init)
    opt.tie()
    opt.undo(Net())
    assert seen == [(link, opt if link else None) for link in (0, 1, 0) for _ in BODY]


@pytest.mark.parametrize("stop", ["failed", "dropped", "untrained"])
def test_a_first_link_that_starts_at_a_product_leaves_the_weights_untouched(stop):
    model, before = Net(), Net().state_dict()
    if stop == "failed":
        with pytest.raises(TypeError):
            wrap_init(model, random_pair, nonsense=1)
    else:
        wrap_init(model, random_pair).finish(merge=stop == "untrained")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def wrap_init(model, init, **kwargs):
    link = LinkConfig(r=2, target_modules=BODY, init=init)
    return ChainOptimizer(torch.optim.SGD, model, StepKnots(at=[3]), link=link, lr=0.02, **kwargs)


def test_weights_that_are_loaded_over_what_a_first_link_took_are_noticed():
    model, before = Net(), Net().state_dict()
    opt = wrap_init(model, random_pair)
    model.load_state_dict(before, strict=False)
    for act in (lambda: train(opt, model, 1), lambda: train(opt, model, 1), opt.tie):
        with pytest.raises(RuntimeError, match="load the weights before the ChainOptimizer is made"):
            act()


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("way", ["follow", "tie", "undo"])
def test_a_chain_goes_on_when_the_weights_have_changed_before_its_first_step(way, steps, merge):
    model, other, fresh = Net(), Net(), Net()
    opt = wrap_init(model, random_pair)
    if way == "follow":
        earlier = wrap_init(other, random_pair)
        train(earlier, other, 4)
        earlier.finish()
        opt.follow(earlier.chain)
    else:
        opt.tie()
    if way == "undo":
        opt.tie()
        opt.undo(Net())
    train(opt, model, steps)
    opt.finish(merge=merge)
    opt.chain.apply(fresh)
    for name, value in model.state_dict().items():  # a link that is dropped leaves the rounding of two sums
        assert torch.allclose(value, fresh.state_dict()[name], rtol=0, atol=0 if merge and steps else 1e-6)


@pytest.mark.parametrize(
    ("init", "kind", "message"),
    [
        (7, TypeError, "init=7 must be one of 'gaussian'"),
        (lambda start: None, TypeError, "returned a NoneType for 'first': return A, or a pair"),
        (lambda start: (torch.zeros(2, 6),), TypeError, "returned a tuple"),
        (lambda start: torch.zeros(6, 2), ValueError, r"A must be 2×6 and B 6×2"),
        (lambda start: torch.zeros(2, 6, dtype=torch.int64), ValueError, "of floating-point numbers"),
        (lambda start: torch.full((2, 6), torch.nan), ValueError, "values that are not finite in torch.float32"),
    ],
)
def test_an_init_that_cannot_be_is_refused_before_anything_changes(init, kind, message):
    model = Net()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(kind, match=message):
        wrap_init(model, init)
    assert before == {name: type(module) for name, module in model.named_modules()}


def views_of_the_live_link(start):
    layer = start.opt.live.layers[start.path]
    return layer.lora_B.t(), layer.lora_A.t()


def a_view_of_the_weight(start):
    return start.opt.model.get_submodule(start.path).weight[: start.rank]


@pytest.mark.parametrize("views", [views_of_the_live_link, a_view_of_the_weight])
def test_an_init_may_return_views_of_what_the_knot_changes(views):
    wanted = {}

    def init(start):
        if start.link == 0:
            return random_pair(start)
        made = views(start)
        wanted[start.path] = copy.deepcopy([x.detach() for x in (made if isinstance(made, tuple) else (made,))])
        return made

    model = Net()
    opt = wrap_init(model, init)
    train(opt, model, 2)
    opt.tie()
    for path, layer in opt.live.layers.items():
        assert all(map(torch.equal, wanted[path], (layer.lora_A, layer.lora_B))), path


@pytest.mark.parametrize("train_", ["both", "B"])
def test_a_pair_whose_a_is_zero_has_not_been_trained(train_, caplog):
    model = Net()
    link = LinkConfig(
        r=2, target_modules=BODY, train=train_, init=lambda s: (torch.zeros(2, s.shape[1]), torch.ones(s.shape[0], 2))
    )
    opt = ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=link, lr=0.02)
    assert opt.live.is_zero()
    train(opt, model, 1)
    assert "the link was trained before this optimizer's first step" not in caplog.text
    assert opt.live.is_zero() == (train_ == "B")  # where A is frozen at zero, nothing can be trained


@pytest.mark.parametrize("init", [random_pair, by_principal_directions])
def test_a_link_that_starts_anywhere_and_has_no_gradient_is_noticed(init, caplog):
    class Bypass(Net):
        def forward(self, x):
            return self.head(torch.tanh(self.first(x)))

    model = Bypass()
    opt = wrap_init(model, init)
    train(opt, model, 3)
    assert "of 1 of 2 layers (second) has had no gradient" in caplog.text


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(
    ("a", "b", "kwargs", "kind", "message"),
    [
        (1.0, 1e4, {}, KnotError, "cannot start: without its s·BA, layer 'first' would get a W [+] sBA beyond"),
        (1e-6, 1e5, {"dtype": torch.float16}, ValueError, "values that are not finite in torch.float16 for 'first'"),
        (1e5, 0.0, {"dtype": torch.float16}, ValueError, "values that are not finite in torch.float16 for 'first'"),
    ],
)
def test_a_start_that_the_weight_or_the_factors_cannot_hold_changes_nothing(at, a, b, kwargs, kind, message):
    def init(start):
        if start.link != at:
            return random_pair(start)
        return torch.full((start.rank, start.shape[1]), a), torch.full((start.shape[0], start.rank), b)

    def made(model):
        link = LinkConfig(r=2, target_modules=BODY, init=init, **kwargs)
        return ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=link, lr=0.02)

    model = Net(dtype=torch.float16)
    before = copy.deepcopy(model.state_dict())
    if at:
        opt = made(model)
        train(opt, model, 2, dtype=torch.float16)
        before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=message):
        opt.tie() if at else made(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_whose_weights_gave_back_a_start_is_not_loaded_over(tmp_path):
    model = Net()
    opt = wrap_init(model, random_pair)
    opt.save(tmp_path)
    opt.load(tmp_path)  # before the first step the untouched weights are still there
    model = Net()
    opt = wrap_init(model, random_pair)
    train(opt, model, 1)
    with pytest.raises(RuntimeError, match="trains a link whose start the weights gave back"):
        opt.load(tmp_path)


@pytest.mark.parametrize("part", ["start_A", "start_B", "start_lost"])
@pytest.mark.parametrize("damage", [None, torch.zeros(3, 3)], ids=["missing", "shape"])
def test_a_damaged_start_in_a_state_dict_is_refused_before_anything_changes(part, damage):
    model, resumed = Net(), Net()
    opt, other = wrap_init(model, random_pair), wrap_init(resumed, random_pair)
    train(opt, model, 4)
    state = copy.deepcopy(opt.state_dict())
    tensors = state["cola"]["tensors"]
    tensors[f"{part}:first"] = damage
    if damage is None:
        del tensors[f"{part}:first"]
    before = copy.deepcopy(other.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=r"lacks one of its factors|no number|does not fit the link here"):
        other.load_state_dict(state)
    assert other.state_dict()["param_groups"] == before
    assert other.live.index == 0


def test_an_init_that_fails_at_a_knot_changes_nothing():
    def fail_later(start):
        if start.link:
            raise ArithmeticError("mine")
        return random_pair(start)

    model = Net()
    opt = wrap_init(model, fail_later)
    train(opt, model, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArithmeticError, match="mine"):
        opt.tie()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(opt.chain) == 0


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
