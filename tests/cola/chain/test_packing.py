"""The encoding of an optimizer's state: what is unpacked is what was packed."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cola.chain.packing import pack, unpack

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.lists(st.floats(width=32), max_size=3).map(torch.tensor),
)  # fmt: skip
KEYS = st.one_of(st.text(max_size=4), st.integers(), st.tuples(st.integers(), st.text(max_size=2)))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(st.sampled_from(["float", "tensor", "tuple", "dict"]), inner, max_size=2),
    ),
    max_leaves=8,
)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    return a == b or (a != a and b != b)


@given(VALUES)
def test_packing_round_trips_through_json(value):
    tensors = {}
    text = json.dumps(pack(value, "value", tensors), allow_nan=False)
    assert equal(unpack(json.loads(text), tensors), value)


@pytest.mark.parametrize("keys", [(0, "0"), ("a/b", "a"), ("x~1", "x")], ids=str)
def test_packing_keeps_tensors_apart_whose_keys_read_alike(keys):
    one, two = torch.zeros(1), torch.ones(1)
    value = {keys[0]: one, keys[1]: {"b": two} if keys[1] == "a" else two}
    tensors = {}
    assert equal(unpack(json.loads(json.dumps(pack(value, "s", tensors))), tensors), value)


def test_packing_names_what_it_cannot_keep():
    with pytest.raises(TypeError, match=r"state/3/hook is a function"):
        pack({3: {"hook": lambda: 0}}, "state", {})
