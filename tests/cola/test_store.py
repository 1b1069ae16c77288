"""A chain on disk: what is read is what was written, nothing is rewritten, and what is damaged is named."""

import copy
import errno
import json
import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cola import (
    Chain,
    ChainOptimizer,
    Factor,
    KnotReport,
    LayerReport,
    Link,
    LinkConfig,
    StepKnots,
    StoreError,
    files,
    store,
    tensorfile,
)
from tests.models import BODY, Net, train


def trained(steps=7, rounding="auto", dtype=torch.float32, **link):
    """A model at the end of a chain of links tied every two steps, and its chain."""
    model = Net(dtype=dtype)
    config = LinkConfig(**{"r": 2, "target_modules": BODY, **link})
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=config, rounding=rounding, seed=5, lr=0.02)
    train(opt, model, steps, dtype=dtype)
    opt.finish()
    return model, opt.chain


def same_links(one, other):
    return len(one) == len(other) and all(store.link_to_bytes(a) == store.link_to_bytes(b) for a, b in zip(one, other))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


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
    data = store.link_to_bytes(link)
    again = store.link_from_bytes(data, files.Path("here"))
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
    assert store.link_to_bytes(again) == data  # equal links, equal bytes: the name follows from the content


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


# undo


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("as_state_dict", [True, False])
def test_undo_rebuilds_the_weights_without_the_last_link(rounding, as_state_dict):
    options = {"rounding": rounding, "dtype": torch.bfloat16, "bias": "lora_only"}
    model, chain = trained(steps=8, **options)
    base = Net(dtype=torch.bfloat16)
    expected = Net(dtype=torch.bfloat16)
    chain.apply(expected, upto=len(chain) - 1)
    last = chain[-1]
    assert chain.undo(model, base.state_dict() if as_state_dict else base) is last
    assert same(model, expected)
    while len(chain):
        chain.undo(model, base)
    assert same(model, base)
    with pytest.raises(ValueError, match="empty chain"):
        chain.undo()


def test_undo_refuses_another_base_and_changes_nothing():
    model, chain = trained()
    before = copy.deepcopy(model)
    for bad, message in ((Net(seed=9), "wrong base"), (model, "the model itself"), ({}, "base has no 'first.weight'")):
        with pytest.raises(ValueError, match=message):
            chain.undo(model, bad)
    with pytest.raises(ValueError, match="needs both"):
        chain.undo(model)
    assert len(chain) == 4
    assert same(model, before)


def test_undo_in_a_run_begins_the_link_again():
    """Trained on from there with the same batches, the run repeats itself."""
    model = Net()
    policy = StepKnots(at=[2, 4])
    opt = ChainOptimizer(torch.optim.AdamW, model, policy, link=LinkConfig(r=2, target_modules=BODY), lr=0.02)
    train(opt, model, 2)
    expected = copy.deepcopy(model.state_dict())
    train(opt, model, 3, start=2)
    undone = opt.undo(Net())
    assert undone.index == 1
    assert opt.live.index == 1
    assert not opt.state
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.values()))
    opt.undo(Net().state_dict())
    assert torch.equal(model.first.weight, Net().first.weight)
    train(opt, model, 2)
    opt.tie()
    assert len(opt.chain) == 1
    with pytest.raises(ValueError, match="wrong base"):
        opt.undo(Net(seed=4))
    opt.undo(Net())
    with pytest.raises(ValueError, match="no knot"):
        opt.undo(Net())


def test_follow_goes_on_after_an_earlier_chain(tmp_path):
    model, earlier = trained(steps=4)
    followed = Net()
    opt = ChainOptimizer(
        torch.optim.AdamW, followed, StepKnots(every=3), link=LinkConfig(r=1, target_modules=["second"]), lr=0.02
    )
    opt.follow(earlier)
    assert torch.equal(followed.first.weight, model.first.weight)
    train(opt, followed, 4)
    opt.save(tmp_path)
    again = Net()
    other = ChainOptimizer(
        torch.optim.AdamW, again, StepKnots(every=3), link=LinkConfig(r=1, target_modules=["second"]), lr=0.02
    )
    other.load(tmp_path)
    opt.finish(), other.finish()
    assert [link.index for link in opt.chain] == [0, 1, 2, 3]
    fresh = Net()
    opt.chain.apply(fresh)
    assert same(fresh, followed)
    assert same(fresh, again)
    with pytest.raises(ValueError, match="wrong base"):
        ChainOptimizer(
            torch.optim.SGD, Net(seed=2), StepKnots(every=3), link=LinkConfig(r=1, target_modules=BODY), lr=0.1
        ).follow(earlier)


# damage


@pytest.fixture
def saved(tmp_path):
    _, chain = trained()
    chain.save(tmp_path / "chain")
    return tmp_path / "chain"


def edit(path, change):
    """Change a manifest and seal it again, as somebody who knows the format could."""
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_bytes(files.seal(content))


DAMAGE = {
    "no manifest": (lambda d: (d / "chain.json").unlink(), r"chain\.json is missing"),
    "manifest cut": (lambda d: os.truncate(d / "chain.json", 100), r"chain\.json is not readable as JSON"),
    "manifest empty": (lambda d: (d / "chain.json").write_text(""), r"chain\.json is not readable as JSON"),
    "manifest edited": (
        lambda d: (d / "chain.json").write_text((d / "chain.json").read_text().replace('"missing": 0', '"missing": 1')),
        r"chain\.json was edited or damaged",
    ),
    "manifest foreign": (lambda d: (d / "chain.json").write_text('{"a": 1}'), r"not a cola-chain manifest"),
    "manifest binary": (lambda d: (d / "chain.json").write_bytes(b"\x80\x04\xff"), r"chain\.json is not readable"),
    "deep": (lambda d: (d / "chain.json").write_text("[" * 100_000), r"chain\.json is not readable as JSON"),
    "later format": (
        lambda d: edit(d / "chain.json", lambda c: c.update(version=3)),
        r"version 3, .* reads versions 1 and 2",
    ),
    "link gone": (lambda d: link(d, 1).unlink(), r"link-00001-\w+\.safetensors is missing"),
    "link cut": (lambda d: os.truncate(link(d, 1), 50), r"link-00001-\w+\.safetensors is truncated: 50 of"),
    "link longer": (
        lambda d: link(d, 1).write_bytes(link(d, 1).read_bytes() + b"x"),
        r"link-00001-\w+\.safetensors has \d+ bytes",
    ),
    "link flipped": (lambda d: flip(link(d, 1)), r"link-00001-\w+\.safetensors is not as it was written"),
    "link a folder": (lambda d: (p := link(d, 1), p.unlink(), p.mkdir()), r"link-00001-\w+.* is not a regular file"),
    "link a pipe": (lambda d: (p := link(d, 1), p.unlink(), os.mkfifo(p)), r"link-00001-\w+.* is not a regular file"),
    "links swapped": (
        lambda d: edit(d / "chain.json", lambda c: c["links"].reverse()),
        r"lists link-00003-\w+.safetensors as link 0, and it is link 3",
    ),
    "link left out": (lambda d: edit(d / "chain.json", lambda c: c["links"].pop(1)), r"as link 1, and it is link 2"),
}


def link(directory, index):
    return directory / link_name(directory, index)


def link_name(directory, index):
    return json.loads((directory / "chain.json").read_text())["links"][index]["file"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(what, saved):
    damage, message = DAMAGE[what]
    damage(saved)
    with pytest.raises(StoreError, match=message):
        Chain.load(saved)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(StoreError, match="is not a directory"):
        Chain.load(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"chain\.json is missing"):
        Chain.load(tmp_path)


def test_a_damaged_directory_is_repaired_by_saving(saved):
    os.truncate(saved / "chain.json", 10)
    os.truncate(next(saved.glob("link-00002-*")), 10)
    _, chain = trained()
    chain.save(saved)
    assert same_links(Chain.load(saved), chain)


def test_another_programs_manifest_is_not_replaced(tmp_path):
    (tmp_path / "chain.json").write_text('{"links": "mine"}')
    _, chain = trained()
    with pytest.raises(StoreError, match="belongs to another program"):
        chain.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["chain.json"]


# suspicion


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/hostname", "link-00000-0123456789abcdef.safetensors/../x", "chain.json", ""],
)
def test_file_names_that_lead_elsewhere_are_refused(name, saved):
    edit(saved / "chain.json", lambda content: content["links"][0].update(file=name))
    with pytest.raises(StoreError, match="is not the name of a file of a chain"):
        Chain.load(saved)


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/../b", "a..b", ".", "..", "a\\b", "a\0b", "a\nb"])
def test_layer_names_that_could_be_paths_are_refused(name, tmp_path):
    factor = Factor(torch.ones(1, 2), torch.ones(2, 1), 1.0, "nearest")
    bad = Link(0, 0, {name: factor}, {}, KnotReport(0, 1, 1, 1.0, 0.0, None, 0.0))
    worse = Link(0, 0, {}, {name: torch.ones(1)}, KnotReport(0, 1, 1, 1.0, 0.0, None, 0.0))
    for one in (bad, worse):
        with pytest.raises(ValueError, match="refused"):
            Chain([one]).save(tmp_path / "deep" / "chain")
    with pytest.raises(ValueError, match="refused"):
        Chain([bad]).to_peft(tmp_path / "deep" / "adapter")
    assert not list(tmp_path.rglob("*.safetensors"))
    content = {"index": 0, "seed": 0, "layers": {name: {"scaling": 1.0, "rounding": "nearest"}}, "trained": []}
    data = tensorfile.dump({f"A:{name}": factor.A, f"B:{name}": factor.B}, content)
    with pytest.raises(StoreError, match="refused"):
        store.link_from_bytes(data, tmp_path / "link")


def header(entries, data=b"", length=None):
    text = json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        header({}, length=1 << 60),
        header({"A": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        header({"A": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, b"1234"),
        header({"A": {"dtype": "F32", "shape": [1 << 32, 1 << 32], "data_offsets": [0, 0]}}),
        header({"A": {"dtype": "F32", "shape": [int("9" * 4000)] * 3000, "data_offsets": [0, 4]}}, b"1234"),
        header({"A": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}, b"1234"),
        header({"A": {"dtype": "F32", "shape": [1 << 62] * 100_000, "data_offsets": [0, 4]}}, b"1234"),
        header({"A": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        header({"A": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"),
        header({"A": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, b"1234"),
        header({"A": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        header({"A": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        header({"A": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"),
        header({"A": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"),
        header({k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "AB"}, b"1234"),
        header({"__metadata__": {"cola": 3}}),
        header({"__metadata__": {"cola": "{"}}),
        header({"__metadata__": []}),
        header([]),
        header({"A": None}),
        b"\x10" + bytes(7) + b'{"A":1,  "A": 1}',
    ],
)
def test_headers_are_checked_before_memory_is_taken(data, tmp_path):
    with pytest.raises(StoreError, match="here"):
        tensorfile.load(data, files.Path("here"))


def link_with(**changes):
    """The bytes of a link whose JSON text has other values, as text, than a link's."""
    content = {
        "index": 0, "seed": 0, "layers": {"x": {"scaling": "SCALING", "rounding": "nearest"}}, "trained": [],
        "report": "REPORT",
    }  # fmt: skip
    report = '{"dict": [["index", 0], ["step", 1], ["rank", 1], ["delta_norm", DELTA], ["lost_norm", 0.0], '
    report += '["loss", null], ["seconds", 0.0], ["layers", {"dict": []}]]}'
    values = {"DELTA": "1.0", "SCALING": "1.0", **changes}
    text = json.dumps(content).replace('"REPORT"', report).replace('"SCALING"', values["SCALING"])
    text = text.replace("DELTA", values["DELTA"])
    entries = {
        "__metadata__": {"cola": text},
        "A:x": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        "B:x": {"dtype": "F32", "shape": [2, 1], "data_offsets": [8, 16]},
    }
    return header(entries, bytes(16))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "true", "1" * 400, "null", '"1"', "[]"])
def test_numbers_that_are_none_are_refused(number):
    path = files.Path("here")
    assert store.link_from_bytes(link_with(SCALING="2"), path).factors["x"].scaling == 2
    for place in ("SCALING", "DELTA"):
        with pytest.raises(StoreError, match="here"):
            store.link_from_bytes(link_with(**{place: number}), path)
    if number in ("NaN", "Infinity", "-Infinity", "1e400"):
        with pytest.raises(StoreError, match=r"here is not readable as JSON .*is not a finite number"):
            files.parse(f'{{"a": [{number}]}}'.encode(), path)


@pytest.mark.parametrize("depth", [90, 150, 950, 100_000])
@pytest.mark.parametrize("ends", [("[", "]"), ('{"dict": [[', ", 1]]}"), ('{"tuple": [', "]}")])
def test_depth_is_no_way_out(depth, ends):
    """What is nested far deeper than anything that is written here is refused, not followed."""
    bomb = ends[0] * depth + "1" + ends[1] * depth
    with pytest.raises(StoreError, match="here"):
        store.link_from_bytes(link_with(DELTA=bomb), files.Path("here"))


def test_depth_is_bounded():
    def nested(depth):
        return ("[" * depth + "]" * depth).encode()

    assert files.parse(nested(files.MAX_DEPTH), files.Path("here")) is not None
    with pytest.raises(StoreError, match=r"here is not readable as JSON .*more than 100 levels"):
        files.parse(nested(files.MAX_DEPTH + 2), files.Path("here"))


def test_a_file_larger_than_its_manifest_says_is_not_read(saved):
    path = link(saved, 0)
    with open(path, "r+b") as file:
        file.truncate(1 << 40)  # a terabyte, sparse
    with pytest.raises(StoreError, match="bytes, where"):
        Chain.load(saved)


def test_a_file_that_memory_cannot_hold_is_named(saved, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: type("F", (), {
        "__enter__": lambda self: self, "__exit__": lambda *_: os.close(args[0]), "read": full})())  # fmt: skip
    with pytest.raises(StoreError, match=r"chain.json has \d+ bytes, more than there is memory for"):
        Chain.load(saved)


class Bomb:
    """Unpickling it would leave a mark."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_nothing_is_unpickled(tmp_path):
    """A pickle bomb in the place of every file that is read, one at a time, and as torch.save would write it."""
    model = Net()
    opt = ChainOptimizer(
        torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(r=1, target_modules=BODY), lr=0.02
    )
    train(opt, model, 3)
    mark = tmp_path / "exploded"
    torch.save(Bomb(mark), tmp_path / "bomb.pt")
    bombs = [pickle.dumps(Bomb(mark)), pickle.dumps(Bomb(mark), protocol=0), (tmp_path / "bomb.pt").read_bytes()]
    readers = {"chain": Chain.load, "checkpoint": lambda d: resumer().load(d), "adapter": Chain.from_peft}

    def resumer():
        return ChainOptimizer(
            torch.optim.AdamW, Net(), StepKnots(every=2), link=LinkConfig(r=1, target_modules=BODY), lr=0.02
        )

    tried = 0
    for kind, load in readers.items():
        directory = tmp_path / kind
        {"chain": opt.chain.save, "checkpoint": opt.save, "adapter": opt.chain.to_peft}[kind](directory)
        for path in sorted(directory.iterdir()):
            if path.name == "export.json":  # written for people, never read
                continue
            good = path.read_bytes()
            for bomb in bombs:
                path.write_bytes(bomb)
                with pytest.raises(StoreError, match=path.name.split("-")[0]):
                    load(directory)
                tried += 1
            path.write_bytes(good)
            load(directory)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(StoreError, match="is a pickle, which is never read"):
        Chain.from_peft(tmp_path / "adapter")
    assert tried == 3 * (2 + 3 + 2)
    assert not mark.exists()


# errors of the operating system


def test_a_full_disk_leaves_what_was_there(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    _, longer = trained(steps=9)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; what was saved before is intact") as raised:
        longer.save(saved)
    assert raised.value.errno == errno.ENOSPC
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_file_in_the_place_of_the_directory(tmp_path):
    _, chain = trained()
    (tmp_path / "chain").write_text("")
    with pytest.raises(StoreError, match="is a file: give a directory"):
        chain.save(tmp_path / "chain")
    with pytest.raises(OSError, match="what was saved before is intact"):
        chain.save(tmp_path / "chain" / "below")
