"""A stored chain that is damaged, forged or cut short by the disk: the error names the file, and nothing is trusted."""

import errno
import json
import os
import pickle

import pytest
import torch

from cola import Chain, ChainOptimizer, Factor, KnotReport, Link, LinkConfig, StepKnots, StoreError
from cola.chain import files, on_disk, tensorfile
from cola.common.version import FORMAT
from tests.cola.chain.stored import same_links, trained
from tests.models import BODY, Net, train

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
    "earlier format": (
        lambda d: edit(d / "chain.json", lambda c: c.update(version=FORMAT - 1)),
        rf"version {FORMAT - 1}, .* reads version {FORMAT}: use the version of cola that wrote it",
    ),
    "later format": (
        lambda d: edit(d / "chain.json", lambda c: c.update(version=FORMAT + 1)),
        rf"version {FORMAT + 1}, .* reads version {FORMAT}",
    ),
    "link gone": (lambda d: link(d, 1).unlink(), r"link-00001-\w+\.safetensors is missing"),
    "link cut": (lambda d: os.truncate(link(d, 1), 50), r"link-00001-\w+\.safetensors is truncated: 50 of"),
    "link longer": (
        lambda d: link(d, 1).write_bytes(link(d, 1).read_bytes() + b"x"),
        r"link-00001-\w+\.safetensors has \d+ bytes",
    ),
    "link flipped": (lambda d: flip(link(d, 1)), r"link-00001-\w+\.safetensors has changed since it was written"),
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
        on_disk.link_from_bytes(data, tmp_path / "link")


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
def test_damaged_headers_are_refused(data, tmp_path):
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
    assert on_disk.link_from_bytes(link_with(SCALING="2"), path).factors["x"].scaling == 2
    for place in ("SCALING", "DELTA"):
        with pytest.raises(StoreError, match="here"):
            on_disk.link_from_bytes(link_with(**{place: number}), path)
    if number in ("NaN", "Infinity", "-Infinity", "1e400"):
        with pytest.raises(StoreError, match=r"here is not readable as JSON .*is not a finite number"):
            files.parse(f'{{"a": [{number}]}}'.encode(), path)


@pytest.mark.parametrize("depth", [90, 150, 950, 100_000])
@pytest.mark.parametrize("ends", [("[", "]"), ('{"dict": [[', ", 1]]}"), ('{"tuple": [', "]}")])
def test_depth_is_no_way_out(depth, ends):
    """What is nested far deeper than anything that is written here is refused, not followed."""
    bomb = ends[0] * depth + "1" + ends[1] * depth
    with pytest.raises(StoreError, match="here"):
        on_disk.link_from_bytes(link_with(DELTA=bomb), files.Path("here"))


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
