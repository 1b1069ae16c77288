"""The digest of a tensor sees every change of its value, and nothing else."""

import copy
import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cola.chain.fingerprint import Digests, checksum, digests

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(1, 6), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return (torch.randn(shape, generator=generator) * 3).to(draw(st.sampled_from(DTYPES)))


@given(tensors(), st.data())
def test_one_bit_is_seen(tensor, data):
    other = tensor.clone()
    bytes_ = other.view(-1).view(torch.uint8)
    bit = 0 if tensor.dtype == torch.bool else data.draw(st.integers(0, 7))
    bytes_[data.draw(st.integers(0, len(bytes_) - 1))] ^= 1 << bit
    assert checksum(other) != checksum(tensor)


@given(tensors(), st.data())
def test_moved_values_are_seen(tensor, data):
    """Two elements swapped, rows in another order: seen whenever the values at a place are others."""
    flat = tensor.clone().view(-1)
    order = torch.tensor(data.draw(st.permutations(range(len(flat)))))
    moved = flat[order].view(tensor.shape)
    bits = [x.contiguous().view(-1).view(torch.uint8) for x in (tensor, moved)]
    assert (checksum(moved) == checksum(tensor)) == torch.equal(*bits)


@given(st.integers(1, 1 << 20), st.integers(0, 97), st.integers(1, 40), st.integers(1, 40))
def test_edits_that_cancel_out_are_seen(amount, first, gap, width):
    """Where sums of the bits, plain and weighted by position, stay as they were."""
    weight = torch.randint(0, 1 << 24, (256,), dtype=torch.int32, generator=torch.Generator().manual_seed(first))
    edited = weight.clone()
    for place, sign in ((first, 1), (first + gap, -1), (first + gap + width, -1), (first + 2 * gap + width, 1)):
        edited[place] += sign * amount  # 1, −1, −1, 1 at i, i+a, i+a+b, i+2a+b: both sums are zero
    if torch.equal(edited, weight):
        return
    weight, edited = weight.view(torch.float32), edited.view(torch.float32)
    assert checksum(weight) != checksum(edited)


@given(tensors())
def test_it_is_by_value_however_the_tensor_is_stored(tensor):
    expected = checksum(tensor)
    assert checksum(tensor.clone()) == expected
    spread = torch.stack([tensor, tensor], dim=-1)[..., 0]
    assert checksum(spread) == expected
    assert checksum(nn.Parameter(tensor, requires_grad=False)) == expected
    if tensor.dim() == 2:
        assert checksum(tensor.t().contiguous().t()) == expected


def test_signs_of_zero_nans_and_large_tensors(monkeypatch):
    zero, minus = torch.zeros(3), torch.tensor([0.0, -0.0, 0.0])
    assert checksum(zero) != checksum(minus)
    quiet, other = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert checksum(quiet) != checksum(other)
    large = torch.randn(1000, 700)
    expected = checksum(large)
    monkeypatch.setattr("cola.chain.fingerprint._PIECE", 12345)  # in pieces
    assert checksum(large) == expected
    assert checksum(torch.tensor(1 + 2j)) != checksum(torch.tensor(1 - 2j))
    assert checksum(torch.zeros(0)) == checksum(torch.zeros(0, 3))


def test_it_does_not_depend_on_threads():
    weights, threads = {str(i): torch.randn(500, 500) for i in range(5)}, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = digests(weights)
        torch.set_num_threads(4)
        assert digests(weights) == one
    finally:
        torch.set_num_threads(threads)
    assert one == {name: checksum(weight) for name, weight in weights.items()}


def test_a_tensor_under_several_names_is_read_once(monkeypatch):
    read = []
    monkeypatch.setattr("cola.chain.fingerprint.checksum", lambda tensor: read.append(tensor) or "x")
    weight = torch.ones(3)
    assert digests({"a": weight, "b": weight, "c": torch.ones(3)}) == {"a": "x", "b": "x", "c": "x"}
    assert len(read) == 2


def test_what_is_remembered_is_forgotten_with_any_change():
    cache, weight = Digests(), nn.Parameter(torch.ones(4))
    read = []

    def of(tensor):
        read.append(cache.of({"w": tensor})["w"])
        return read[-1] == checksum(tensor)

    assert of(weight)
    assert cache.of({"w": weight}) == {"w": read[-1]}
    with torch.no_grad():
        weight.add_(1)
    assert of(weight)
    weight.data = torch.full((4,), 7.0)  # does not raise the version
    assert of(weight)
    assert of(nn.Parameter(torch.full((4,), 9.0)))
    statistics = torch.zeros(3)
    for _ in range(2):
        nn.functional.batch_norm(torch.randn(5, 3), statistics, torch.ones(3), training=True)  # raises no version
        assert of(statistics)
    with torch.inference_mode():
        counted = nn.Parameter(torch.ones(4), requires_grad=False)
        assert of(counted)
        counted.add_(1)
        assert of(counted)
    assert cache.of({"w": torch.ones(2, device="meta")}) == {"w": None}
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert copied.of({"w": weight}) == {"w": checksum(weight)}
