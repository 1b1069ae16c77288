"""A chain on disk: what is read is what was written, and nothing is rewritten."""

import copy
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cola import Chain, ChainOptimizer, Factor, KnotReport, LayerReport, Link, LinkConfig, StepKnots
from cola.chain import files, on_disk
from tests.cola.chain.stored import same, same_links, trained
from tests.models import BODY, Net, train

# round trips

TENSORS = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
PATHS = st.lists(
    st.from_regex(r"[A-Za-z_]\w{0,5}(\.\w{1,5}){0,3}", fullmatch=True), min_size=1, max_size=3, unique=True
)
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@st.composite
def links(draw, index=0):
    out, inner, rank = (draw(st.integers(1, 5)) for _ in range(3))
    dtype, seed = draw(TENSORS), draw(st.integers(-(2**65), 2**65))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    factors, layers = {}, {}
    for path in draw(PATHS):
        A, B = torch.randn(rank, inner, generator=generator), torch.randn(out, rank, generator=generator)
        scaling, rounding = draw(st.floats(-1e6, 1e6)), draw(st.sampled_from(["nearest", "stochastic", "compensated"]))
        factors[path] = Factor(A.to(dtype), B.to(dtype), scaling, rounding)
        layers[path] = LayerReport(draw(NUMBERS), draw(NUMBERS), rounding)
    trained = {
        f"{path}.bias": torch.randn(out, generator=generator).to(dtype) for path in factors if draw(st.booleans())
    }
    report = KnotReport(index, 3, rank, draw(NUMBERS), draw(NUMBERS), draw(st.none() | NUMBERS), 0.5, layers)
    return Link(index, seed, factors, trained, report)


@given(links())
def test_a_link_round_trips(link):
    data = on_disk.link_to_bytes(link)
    again = on_disk.link_from_bytes(data, files.Path("here"))
    assert repr(again.report) == repr(link.report)
    assert (again.index, again.seed) == (link.index, link.seed)
    assert again.factors.keys() == link.factors.keys()
    for path, factor in link.factors.items():
        other = again.factors[path]
        assert (other.scaling, other.rounding) == (factor.scaling, factor.rounding)
        assert other.A.dtype == factor.A.dtype
        assert torch.equal(other.A, factor.A)
        assert torch.equal(other.B, factor.B)
    assert again.trained.keys() == link.trained.keys()
    assert all(torch.equal(again.trained[p], link.trained[p]) for p in link.trained)
    assert on_disk.link_to_bytes(again) == data  # equal links, equal bytes: the name follows from the content


@pytest.mark.parametrize(
    ("rounding", "dtype"),
    [("auto", torch.float32), ("stochastic", torch.bfloat16), ("compensated", torch.bfloat16), ("auto", torch.float64)],
)
def test_a_loaded_chain_applied_to_the_base_gives_the_same_bits(rounding, dtype, tmp_path):
    model, chain = trained(rounding=rounding, dtype=dtype, bias="lora_only", r=(3, 2, 1))
    chain.save(tmp_path)
    loaded, fresh = Chain.load(tmp_path), Net(dtype=dtype)
    assert same_links(chain, loaded)
    assert loaded.base == chain.base
    loaded.apply(fresh)
    assert same(fresh, model)


def test_any_prefix_applies(tmp_path):
    model, chain = trained(steps=8)
    for upto in range(len(chain) + 1):
        one, two = Net(), Net()
        chain.apply(one, upto=upto)
        shorter = copy.deepcopy(chain)
        while len(shorter) > upto:
            shorter.undo()
        shorter.apply(two)
        assert same(one, two)
    assert same(one, model)
    with pytest.raises(ValueError, match="upto=9 is outside"):
        chain.apply(Net(), upto=9)


def test_a_layer_that_is_the_whole_model(tmp_path):
    """Its path is empty."""
    model, fresh = nn.Linear(4, 4), nn.Linear(4, 4)
    fresh.load_state_dict(model.state_dict())
    link = LinkConfig(r=1, target_modules="all-linear")
    opt = ChainOptimizer(torch.optim.SGD, model, StepKnots(every=1), link=link, lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    opt.finish()
    opt.chain.save(tmp_path)
    Chain.load(tmp_path).apply(fresh)
    assert same(model, fresh)


# nothing is rewritten


def stat(directory):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in directory.glob("link-*")}


def test_appending_rewrites_nothing_that_is_there(tmp_path):
    _, chain = trained(steps=8)
    shorter = copy.deepcopy(chain)
    shorter.undo()
    shorter.save(tmp_path)
    before = stat(tmp_path)
    chain.save(tmp_path)
    after = stat(tmp_path)
    assert len(after) == len(before) + 1
    assert before.items() <= after.items()
    Chain.load(tmp_path).save(tmp_path)
    assert stat(tmp_path) == after


def test_saving_replaces_a_chain_and_leaves_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    _, long = trained(steps=8)
    long.save(tmp_path)
    _, other = trained(steps=4, r=1)
    other.save(tmp_path)
    assert same_links(Chain.load(tmp_path), other)
    assert len(list(tmp_path.iterdir())) == len(other) + 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_saving_clears_what_interrupted_saves_left_and_nothing_else(tmp_path):
    _, chain = trained()
    chain.save(tmp_path)
    good = set(os.listdir(tmp_path))
    link = next(tmp_path.glob("link-*")).name
    ours = [f".{link}.0123abcd.tmp", ".chain.json.0123abcd.tmp", f"link-00007-{'0' * 16}.safetensors"]
    others = [".notes.0123abcd.tmp", "link-1.safetensors", ".chain.json.swp", "state-0.safetensors"]
    for name in (*ours, *others):
        (tmp_path / name).write_bytes(b"x")
    chain.save(tmp_path)
    assert set(os.listdir(tmp_path)) == good | set(others)
    assert same_links(Chain.load(tmp_path), chain)


def test_a_link_that_was_changed_in_place_is_written_again(tmp_path):
    _, chain = trained()
    chain.save(tmp_path)
    chain[0].factors["first"].A.mul_(2)
    chain.save(tmp_path)
    assert same_links(Chain.load(tmp_path), chain)


def test_a_chain_and_a_checkpoint_share_a_directory(tmp_path):
    model = Net()
    opt = ChainOptimizer(
        torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(r=1, target_modules=BODY), lr=0.02
    )
    train(opt, model, 5)
    opt.save(tmp_path)
    assert same_links(Chain.load(tmp_path), opt.chain)  # the chain of a checkpoint is a chain
    opt.chain.save(tmp_path)
    train(opt, model, 2, start=5)
    opt.save(tmp_path)
    assert len(Chain.load(tmp_path)) == 3  # the later of the two
    again = ChainOptimizer(
        torch.optim.AdamW, Net(), StepKnots(every=2), link=LinkConfig(r=1, target_modules=BODY), lr=0.02
    )
    again.load(tmp_path)
    assert again.steps == 7
    assert len(list(tmp_path.glob("state-*"))) == 1


def test_links_that_were_not_kept(tmp_path):
    model = Net()
    opt = ChainOptimizer(
        torch.optim.SGD, model, StepKnots(every=1), link=LinkConfig(r=1, target_modules=BODY), keep_links=False, lr=0.1
    )
    train(opt, model, 2)
    opt.chain.save(tmp_path)
    chain = Chain.load(tmp_path)
    assert [link.report for link in chain] == [link.report for link in opt.chain]
    with pytest.raises(RuntimeError, match="keep_links=False"):
        chain.apply(Net())


def test_a_link_that_is_not_finite_is_not_applied():
    _, chain = trained()
    chain[1].factors["second"].A[0, 0] = float("inf")
    fresh = Net()
    with pytest.raises(ValueError, match="link 1 has non-finite factors on 'second'"):
        chain.apply(fresh)
    assert same(fresh, Net())
