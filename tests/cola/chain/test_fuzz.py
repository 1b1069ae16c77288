"""Mutated files: a clear error or the right chain, never a crash and never a silent difference."""

import contextlib
import json
import random
import re
import shutil

import pytest
import torch

from cola import Chain, ChainOptimizer, LinkConfig, StepKnots, StoreError
from cola.chain import files, on_disk, tensorfile
from cola.common.version import FORMAT
from tests.models import BODY, Net, train

NUMBERS = [0, 1, -1, 2**31, 2**63, 2**64, 10**30, -(2**63), 1e308, 1.5, True, None, "", "x", [], {}, [[]], "../x", "0"]
BITS = [b"", b"\0", b"\xff" * 8, b"{", b"]", b'"', b"9" * 30, b"-", b"1e999", b"NaN", b"../", b"\\u0000", b"null"]


def wrap(model):
    return ChainOptimizer(
        torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(r=1, target_modules=BODY), lr=0.02
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A chain, a checkpoint and an adapter of one run, and what they read as."""
    root = tmp_path_factory.mktemp("fuzz")
    model = Net()
    opt = wrap(model)
    train(opt, model, 5)
    opt.save(root / "checkpoint")
    opt.chain.save(root / "chain")
    opt.chain.to_peft(root / "adapter")
    (root / "adapter" / "export.json").unlink()
    return root


def contents(chain):
    return chain.missing, chain.keep, chain.base, [on_disk.link_to_bytes(link) for link in chain]


def read_checkpoint(directory):
    model = Net()
    opt = wrap(model)
    try:
        opt.load(directory, rng=False)
    except ValueError:
        assert opt.steps == 0
        assert all(torch.equal(a, b) for a, b in zip(model.first.weight, Net().first.weight))
        raise
    return opt.steps, repr(opt.state_dict()), repr(model.state_dict())


READERS = {
    "chain": lambda d: contents(Chain.load(d)),
    "checkpoint": read_checkpoint,
    "adapter": lambda d: contents(Chain.from_peft(d)),
}


def mutated(data, dice):
    """``data`` with one to three accidents: bits, cuts, insertions, copies, numbers."""
    data = bytearray(data)
    for _ in range(dice.randint(1, 3)):
        place, length = dice.randint(0, len(data)), dice.choice([1, 1, 2, 8, 100])
        kind = dice.randrange(7)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = dice.choice(BITS)
        elif kind == 4:
            data[place : place + length] = dice.randbytes(length)
        elif kind == 5:
            data[place:place] = data[place // 2 : place // 2 + length]
        else:
            numbers = list(re.finditer(rb"\d+", bytes(data[:4000])))
            if numbers:
                found = dice.choice(numbers)
                data[found.start() : found.end()] = str(dice.choice([0, 1, 7, -1, 2**31, 2**63, 10**20])).encode()
    return bytes(data)


def edited(value, dice):
    """A JSON value with one place changed, removed or doubled."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        how = dice.randrange(6)
        if how == 0:
            return {k: v for k, v in value.items() if k != key}
        if how == 1:
            return {**{k: v for k, v in value.items() if k != key}, dice.choice(["", "x", "../x", key * 2]): value[key]}
        return {**value, key: edited(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.9:
        i = dice.randrange(len(value))
        how = dice.randrange(5)
        if how == 0:
            return value[:i] + value[i + 1 :]
        if how == 1:
            return [*value, value[i]]
        return [*value[:i], edited(value[i], dice), *value[i + 1 :]]
    return dice.choice(NUMBERS)


def damage(directory, dice, count):
    """Mutate one file ``count`` times; yields after each, and puts the file right again."""
    originals = {p: p.read_bytes() for p in sorted(directory.iterdir())}
    for _ in range(count):
        path = dice.choice(list(originals))
        data = mutated(originals[path], dice)
        if dice.random() < 0.03:
            data = originals[dice.choice(list(originals))]  # a sound file under another's name
        path.write_bytes(data)
        yield path, data == originals[path]
        path.write_bytes(originals[path])


def fuzz(made, tmp_path, kind, count, seed):
    """Files damaged as they lie on the disk."""
    shutil.copytree(made / kind, tmp_path / kind)
    read, dice, refused = READERS[kind], random.Random(f"{kind}/{seed}"), 0
    expected = read(tmp_path / kind)
    for path, unchanged in damage(tmp_path / kind, dice, count):
        found, error = None, None
        try:
            found = read(tmp_path / kind)
        except StoreError as refusal:
            error = refusal
        if error is None:
            # PEFT's files have no checksum, so other numbers in them are another adapter; ours are the same or refused
            assert found == expected or kind == "adapter", f"{path.name} reads differently without an error"
        else:
            assert str(tmp_path / kind) in str(error), f"the message does not name a file: {error}"
            assert not unchanged
            refused += 1
    assert refused > count / 2


def resealed(made, tmp_path, count, seed):
    """Damage by somebody who knows the format: checksums are right again, so that every later check is reached."""
    shutil.copytree(made / "checkpoint", tmp_path / "sealed")
    directory, dice = tmp_path / "sealed", random.Random(seed)
    path = directory / "checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    kept = {p.name: p.read_bytes() for p in directory.iterdir()}
    for _ in range(count):
        changed = json.loads(json.dumps(manifest))
        if dice.random() < 0.4:
            changed = edited(changed, dice)
        else:
            item = dice.choice([changed["state"], *changed["chain"]["links"]])
            data = kept[item["file"]]
            if dice.random() < 0.5:
                data = mutated(data, dice)
            else:
                tensors, content = tensorfile.load(data, path)
                data = tensorfile.dump(tensors, edited(content, dice))
            item.update(size=len(data), digest=files.sha256(data))
            (directory / item["file"]).write_bytes(data)
        if not isinstance(changed, dict):
            continue
        path.write_bytes(files.seal({"format": "cola-checkpoint", "version": FORMAT, **changed}))
        for reader in ("chain", "checkpoint"):
            with contextlib.suppress(ValueError):  # StoreError, or a refusal because it is another run's now
                READERS[reader](directory)
        for name, data in kept.items():
            (directory / name).write_bytes(data)


@pytest.mark.parametrize("kind", READERS)
def test_a_thousand_damaged_files(kind, made, tmp_path):
    fuzz(made, tmp_path, kind, 350, seed=1)


def test_damage_under_right_checksums(made, tmp_path):
    resealed(made, tmp_path, 150, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("kind", READERS)
def test_ten_thousand_damaged_files(kind, made, tmp_path):
    fuzz(made, tmp_path, kind, {"chain": 10_000, "checkpoint": 3000, "adapter": 2000}[kind], seed=2)


@pytest.mark.long
def test_much_damage_under_right_checksums(made, tmp_path):
    resealed(made, tmp_path, 2000, seed=2)
