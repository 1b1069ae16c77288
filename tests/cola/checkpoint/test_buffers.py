"""Buffers that training moves (running statistics) are resumed, recorded, undone and exported like the rest."""

import copy

import pytest
import torch
from torch import nn

from cola import Chain, ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from cola.chain import on_disk
from cola.chain.fingerprint import checksum
from cola.checkpoint.directory import read_run
from tests.models import Net, batch


class Normed(Net):
    """With running statistics, a buffer that never moves, and one that is not persistent."""

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__(seed=seed)
        self.norm, self.inner = nn.BatchNorm1d(6), nn.Sequential(nn.Identity(), nn.BatchNorm1d(6, affine=False))
        self.register_buffer("table", torch.arange(1000.0))
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.to(dtype)

    def forward(self, x):
        self.seen += 1
        hidden = self.norm(torch.tanh(self.first(x)))
        return self.head(self.inner(torch.tanh(self.second(hidden))))


MOVED = sorted(f"{n}.{b}" for n in ("norm", "inner.1") for b in ("running_mean", "running_var", "num_batches_tracked"))


def wrap(model, policy=None, **options):
    link = LinkConfig(**{"r": 2, "target_modules": ["first", "second"], **options.pop("link", {})})
    policy = policy or StepKnots(every=3)
    return ChainOptimizer(torch.optim.AdamW, model, policy, link=link, seed=5, lr=0.02, **options)


def train(opt, model, steps, start=0, dtype=torch.float32):
    for step in range(start, start + steps):
        x, y = batch(step, dtype=dtype)
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_moves_buffers_is_resumed_bit_for_bit(stop, dtype, tmp_path):
    model = Normed(dtype=dtype)
    opt = wrap(model)
    train(opt, model, stop, dtype=dtype)
    opt.save(tmp_path)
    train(opt, model, 8 - stop, start=stop, dtype=dtype)
    resumed = Normed(dtype=dtype)
    again = wrap(resumed)
    again.load(tmp_path)
    train(again, resumed, 8 - stop, start=stop, dtype=dtype)
    assert same(model, resumed)
    opt.finish(), again.finish()
    assert same(model, resumed)
    assert again.chain.base == opt.chain.base
    for chain in (opt.chain, again.chain):
        fresh = Normed(dtype=dtype)
        chain.apply(fresh)
        assert same(fresh, model)


def test_state_dicts_go_on_and_know_the_base(tmp_path):
    for stop in (1, 4):
        model = Normed()
        opt = wrap(model)
        train(opt, model, stop)
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
        train(opt, model, 8 - stop, start=stop)
        for order in (0, 1):
            resumed = Normed()
            again = wrap(resumed)
            for part in (order, 1 - order):
                (resumed, again)[part].load_state_dict(copy.deepcopy(saved[part]))
            train(again, resumed, 8 - stop, start=stop)
            again.finish()
            fresh = Normed()
            again.chain.apply(fresh)
            assert same(fresh, resumed)
            assert sorted(again.chain[-1].trained) == MOVED
        opt.finish()
        assert same(model, resumed)


def test_a_chain_that_is_loaded_apart_tells_what_has_moved():
    """As with distributed checkpointing, which keeps no links in the optimizer's state."""
    model = Normed()
    opt = wrap(model)
    train(opt, model, 4)
    state = {name: value for name, value in copy.deepcopy(opt.state_dict()).items() if name != "cola"}
    weights, links = copy.deepcopy(model.state_dict()), opt.chain.state_dict()
    train(opt, model, 2, start=4)
    resumed = Normed()
    again = wrap(resumed)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    again.chain.load_state_dict(links)
    train(again, resumed, 2, start=4)
    assert sorted(again.chain[1].trained) == sorted(opt.chain[1].trained) == MOVED


def test_only_what_has_moved_is_written(tmp_path):
    model = Normed()
    opt = wrap(model)
    opt.save(tmp_path / "still")
    train(opt, model, 4)
    opt.save(tmp_path / "moved")
    still, moved = (buffers_of(tmp_path / name) for name in ("still", "moved"))
    assert not still
    assert sorted(moved) == MOVED
    assert sorted(opt.chain[0].trained) == MOVED
    size = sum(path.stat().st_size for path in (tmp_path / "moved").glob("link-*"))
    assert size < 8 * 1000  # the table of 4,000 bytes is not in it


def buffers_of(directory):
    return read_run(directory).buffers


def test_a_buffer_that_comes_back_to_its_value_in_the_base_is_still_recorded():
    """Or the value of the knot before would stay."""
    model = Normed()
    opt = wrap(model, policy=StepKnots(every=2))
    train(opt, model, 2)
    for norm in (model.norm, model.inner[1]):
        norm.reset_running_stats()
    model.eval()  # no more statistics
    train(opt, model, 2, start=2)
    opt.finish()
    assert torch.equal(opt.chain[1].trained["norm.running_mean"], torch.zeros(6))
    fresh = Normed()
    opt.chain.apply(fresh)
    assert same(fresh, model)


def test_statistics_that_are_taken_after_the_last_step_are_in_the_chain():
    model = Normed()
    opt = wrap(model, policy=StepKnots(at=[3]))
    train(opt, model, 3)
    with torch.no_grad():
        model(batch(50)[0])
    opt.finish()
    assert len(opt.chain) == 2
    fresh = Normed()
    opt.chain.apply(fresh)
    assert same(fresh, model)
    for link in ({}, {"modules_to_save": ["norm"]}):
        untouched = Normed()
        opt = wrap(untouched, policy=NeverKnots(), link=link)
        untouched.eval()(batch(0)[0])
        assert opt.finish() is None


def test_undo_takes_them_back(tmp_path):
    model = Normed()
    opt = wrap(model, policy=StepKnots(at=[2, 4]))
    train(opt, model, 2)
    after_one = copy.deepcopy(dict(model.named_buffers()))
    train(opt, model, 3, start=2)
    opt.undo(Normed())
    assert torch.equal(model.norm.running_mean, after_one["norm.running_mean"])
    assert torch.equal(model.inner[1].num_batches_tracked, after_one["inner.1.num_batches_tracked"])
    opt.undo(Normed().state_dict())
    assert torch.equal(model.norm.running_mean, torch.zeros(6))
    train(opt, model, 3)
    opt.finish()
    while len(opt.chain):
        opt.chain.undo(model, Normed())
        expected = Normed()
        opt.chain.apply(expected)
        assert same(model, expected)
    assert same(model, Normed())


def test_undo_takes_back_what_no_knot_has_recorded():
    """Statistics that moved in the live link go with it."""
    model = Normed()
    opt = wrap(model, policy=StepKnots(at=[2]))
    model.eval()
    train(opt, model, 2)
    assert not opt.chain[0].trained
    model.train()
    train(opt, model, 1, start=2)
    opt.undo(Normed())
    assert torch.equal(model.norm.running_var, torch.ones(6))


# which values are the base's


@pytest.mark.parametrize("loaded", ["model", "part", "before"])
def test_statistics_of_the_base_are_those_it_came_with(loaded):
    """A pretrained base's have moved long ago; they may arrive after the optimizer was made, in parts too."""
    pretrained = Normed(seed=3)
    for step in range(4):
        pretrained(batch(90 + step)[0])
    model = copy.deepcopy(pretrained) if loaded == "before" else Normed()
    opt = wrap(model)
    if loaded == "model":
        model.load_state_dict(pretrained.state_dict(), strict=False)
    elif loaded == "part":
        model.load_state_dict({n: p for n, p in pretrained.state_dict().items() if "norm" not in n}, strict=False)
        model.norm.load_state_dict(pretrained.norm.state_dict())
    train(opt, model, 4)
    opt.finish()
    for name in MOVED:
        assert opt.chain.base.others[name].digest == checksum(pretrained.get_buffer(name))
    fresh = copy.deepcopy(pretrained)
    opt.chain.apply(fresh)
    assert same(fresh, model)
    model.load_state_dict(Normed().state_dict())  # the hooks are gone
    assert not any(module._load_state_dict_post_hooks for module in model.modules())


def test_a_base_with_other_statistics_is_refused_where_they_would_stay():
    model = Normed().eval()
    opt = wrap(model)
    train(opt, model, 4)
    opt.finish()
    assert not opt.chain[-1].trained
    other = Normed()
    other(batch(0)[0])
    with pytest.raises(ValueError, match=r"wrong base: 'norm\.\w+' has other values"):
        opt.chain.apply(other)


@pytest.mark.parametrize("change", [lambda m: setattr(m, "norm", nn.Identity()), lambda m: m.norm.double()])
def test_load_refuses_a_model_without_the_buffers(change, tmp_path):
    model = Normed()
    opt = wrap(model)
    train(opt, model, 2)
    opt.save(tmp_path)
    other = Normed()
    again = wrap(other)
    change(other)
    with pytest.raises(ValueError, match=r"has a buffer 'norm\.\w+' .* which this model does not have"):
        again.load(tmp_path)
    assert again.steps == 0


def test_links_that_are_not_kept_record_none():
    model = Normed()
    opt = wrap(model, keep_links=False)
    train(opt, model, 4)
    opt.finish()
    assert not any(link.trained for link in opt.chain)


def test_a_model_with_watched_buffers_is_copied_and_pickled(tmp_path):
    model = Normed()
    opt = wrap(model)
    train(opt, model, 2)
    twin, other = copy.deepcopy((model, opt))
    train(opt, model, 4, start=2), train(other, twin, 4, start=2)
    opt.finish(), other.finish()
    assert same(model, twin)
    for one, two in zip(opt.chain, other.chain, strict=True):
        assert on_disk.link_to_parts(one)[0].keys() == on_disk.link_to_parts(two)[0].keys()
    model = Normed()
    wrap(model)
    torch.save(model, tmp_path / "model.pt")


# adapters in PEFT's format


def test_an_adapter_cannot_hold_half_a_module():
    model = Normed()
    opt = wrap(model)
    train(opt, model, 4)
    opt.finish()
    with pytest.raises(ValueError, match=r"cannot hold norm.num_batches_tracked, .* the chain has no 'norm.bias'"):
        opt.chain.to_peft("nowhere")


@pytest.mark.parametrize("what", ["seen_by_all", "first.gain"])
def test_an_adapter_cannot_hold_what_belongs_to_no_module_of_its_own(what, tmp_path):
    model = Net()
    (model if "." not in what else model.first).register_buffer(what.rpartition(".")[2], torch.zeros(3))
    opt = wrap(model)
    train(opt, model, 2)
    model.get_buffer(what).add_(1)
    opt.finish()
    with pytest.raises(ValueError, match=f"cannot hold {what}, which training has moved"):
        opt.chain.to_peft(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_holds_modules_that_are_trained_with_their_statistics(tmp_path):
    peft = pytest.importorskip("peft")

    class Plain(Normed):
        def __init__(self, seed=0):
            super().__init__(seed)
            self.inner = nn.Identity()

    model = Plain()
    opt = wrap(model, link={"modules_to_save": ["norm"]})
    train(opt, model, 5)
    opt.finish()
    opt.chain.to_peft(tmp_path)
    x = batch(0)[0]
    adapted = peft.PeftModel.from_pretrained(Plain(), tmp_path).eval()
    # two sums of float32 products of depth 6 in another order
    assert torch.allclose(adapted(x), model.eval()(x), atol=1e-5, rtol=1e-5)
    frozen = Plain().eval()  # its statistics stay, and its weights do not
    opt = wrap(frozen, link={"modules_to_save": ["norm"]})
    train(opt, frozen, 3)
    opt.finish()
    opt.chain.to_peft(tmp_path / "frozen")
    still = peft.PeftModel.from_pretrained(Plain(), tmp_path / "frozen").eval()
    assert torch.allclose(still(x), frozen(x), atol=1e-5, rtol=1e-5)
    again = Plain()
    Chain.from_peft(tmp_path).apply(again)
    assert torch.equal(again.norm.running_var, model.norm.running_var)
    assert again.norm.num_batches_tracked == 5
