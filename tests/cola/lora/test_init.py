"""How a link starts: by a function of the caller's own, at a product too, recorded and taken back to the bit."""

import copy

import pytest
import torch

from cola import (
    Chain,
    ChainOptimizer,
    KnotError,
    LinkConfig,
    NeverKnots,
    StepKnots,
)
from cola.chain.spectrum import stack
from tests.models import BODY, Net, loss_of, train


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
