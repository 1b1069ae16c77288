"""The fingerprint sees every change of a base, wherever in it that is, and nothing else; a wrong base is refused."""

import copy
import json
import logging
import pickle
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cola import Chain, ChainOptimizer, LinkConfig, NeverKnots, StepKnots, files
from cola.adapters.targets import base_tensors
from cola.fingerprint import Digests, Fingerprint, checksum, checksum_1, digest_1, digests, fingerprint
from tests.models import BODY, Net, loss_of, tiny_gpt2, tiny_opt, train

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def wrap(model, **link):
    config = LinkConfig(**{"r": 2, "target_modules": BODY, **link})
    return ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=config, seed=5, lr=0.02)


def trained(steps=5, **link):
    model = Net()
    opt = wrap(model, **link)
    train(opt, model, steps)
    opt.finish()
    return model, opt.chain


# the digest of a tensor


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
    """Where sums of the bits, plain and weighted by position, stay as they were; format 1 could not tell them apart."""
    weight = torch.randint(0, 1 << 24, (256,), dtype=torch.int32, generator=torch.Generator().manual_seed(first))
    edited = weight.clone()
    for place, sign in ((first, 1), (first + gap, -1), (first + gap + width, -1), (first + 2 * gap + width, 1)):
        edited[place] += sign * amount  # 1, −1, −1, 1 at i, i+a, i+a+b, i+2a+b: both sums are zero
    if torch.equal(edited, weight):
        return
    weight, edited = weight.view(torch.float32), edited.view(torch.float32)
    assert checksum_1(weight) == checksum_1(edited)
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
    monkeypatch.setattr("cola.fingerprint._PIECE", 12345)  # in pieces
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
    monkeypatch.setattr("cola.fingerprint.checksum", lambda tensor: read.append(tensor) or "x")
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


# the whole base


class Wide(Net):
    """With what else a base can hold: an embedding, a norm, a frozen layer, buffers."""

    def __init__(self, seed=0):
        super().__init__(seed=seed)
        self.table, self.norm = nn.Embedding(4, 6), nn.LayerNorm(6)
        with torch.no_grad():
            self.table.weight.copy_(torch.arange(24.0).view(4, 6) / 24)
        self.register_buffer("scale", torch.full((6,), 0.5))
        self.register_buffer("mask", torch.ones(6), persistent=False)

    def forward(self, x):
        return super().forward(self.norm(x) * self.scale * self.mask + self.table.weight[0])


EVERYTHING = sorted(dict(Wide().state_dict()))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    root = tmp_path_factory.mktemp("wide")
    model = Wide()
    opt = wrap(model)
    train(opt, model, 3)
    opt.save(root / "checkpoint")
    opt.finish()
    opt.chain.save(root / "chain")
    return root, model


def altered(name):
    model = Wide()
    with torch.no_grad():
        tensor = model.state_dict()[name]
        tensor.view(-1)[-1] += 2**-20
    return model


def test_every_parameter_and_persistent_buffer_is_covered(wide):
    root, _ = wide
    base = Chain.load(root / "chain").base
    assert sorted(base.prints()) == EVERYTHING
    assert set(base.layers) == set(BODY)


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_base_that_differs_anywhere_is_refused_by_name(name, wide):
    root, model = wide
    layer = name.removesuffix(".weight")
    message = f"wrong base: the weight of layer '{layer}' has" if layer in BODY else f"wrong base: '{name}' has"
    wrong, chain = altered(name), Chain.load(root / "chain")
    before = copy.deepcopy(wrong)
    with pytest.raises(ValueError, match=message):
        chain.apply(wrong)
    assert same(wrong, before)
    opt = wrap(wrong)
    with pytest.raises(ValueError, match=message):
        opt.load(root / "checkpoint")
    with pytest.raises(ValueError, match=message):
        opt.follow(chain)
    assert opt.steps == len(opt.chain) == 0
    tied = copy.deepcopy(model)
    for base in (before, before.state_dict()):
        with pytest.raises(ValueError, match=message):
            chain.undo(tied, base)
    assert same(tied, model)
    chain.apply(wrong := copy.deepcopy(before), check=False)
    assert not same(wrong, before)


def test_a_fingerprint_round_trips_and_what_is_none_is_refused(wide):
    base = Chain.load(wide[0] / "chain").base
    value = base.to_json()
    assert Fingerprint.from_json(value) == Fingerprint.from_json(json.loads(json.dumps(value))) == base
    damage = {"shape": ["6", [6, True], [1.5], 6], "dtype": [None, 3], "digest": [7, [], True]}
    for place, name in (("layers", "first"), ("others", "norm.weight")):
        for key, values in damage.items():
            for bad in values:
                edited = copy.deepcopy(value)
                edited[place][name][key] = bad
                with pytest.raises(TypeError):
                    Fingerprint.from_json(edited)


def test_other_buffers_are_not_compared(wide):
    root, model = wide
    fresh = Wide()
    fresh.mask.mul_(2)
    Chain.load(root / "chain").apply(fresh)
    assert same(fresh, model)


FORMS = {
    "another shape": (lambda m: setattr(m, "table", nn.Embedding(5, 6)), r"'table.weight' is \(5, 6\), .* \(4, 6\)"),
    "another dtype": (lambda m: m.norm.bfloat16(), r"'norm.weight' is bfloat16, .* it is float32: load it as that"),
    "one more": (
        lambda m: setattr(m, "more", nn.Linear(2, 2)),
        r"'more.weight' is here, and the chain's base does not",
    ),
    "one less": (lambda m: delattr(m, "table"), r"the chain's base has 'table.weight', which is missing here"),
    "a buffer less": (lambda m: delattr(m, "scale"), r"the chain's base has 'scale', which is missing here"),
    "no values": (lambda m: m.table.to("meta"), r"'table.weight' has no values to compare"),
}


@pytest.mark.parametrize("what", FORMS)
def test_a_base_of_another_form_is_refused(what, wide):
    root, _ = wide
    change, message = FORMS[what]
    model = Wide()
    change(model)
    with pytest.raises(ValueError, match="wrong base: " + message):
        Chain.load(root / "chain").apply(model)


def test_a_file_of_weights_need_hold_what_is_read_from_it_only(wide):
    root, model = wide
    chain, tied = Chain.load(root / "chain"), copy.deepcopy(model)
    chain.undo(tied, {name: value for name, value in Wide().state_dict().items() if "first" in name or "sec" in name})
    expected = Wide()
    chain.apply(expected)
    assert same(tied, expected)


def test_apply_refuses_another_base_and_changes_nothing():
    _, chain = trained()
    for wrong, message in (
        (Net(seed=1), "layer 'first' has other values"),
        (Net(dtype=torch.float64), "is float64, in the chain's base it is float32: load it as that"),
        (Net(d=7), r"is \(6, 6\), the layer is \(7, 7\)"),
        (nn.Sequential(nn.Linear(2, 2)), "has a link on 'first', which this model does not have"),
    ):
        before = copy.deepcopy(wrong)
        with pytest.raises(ValueError, match=message):
            chain.apply(wrong)
        assert same(wrong, before)
    other = Net(seed=1)
    chain.apply(other, check=False)
    assert not same(other, Net(seed=1))


# when it is taken


def test_the_base_is_what_the_weights_were_at_the_first_knot():
    """A state dict that arrives after the optimizer was made is the base."""
    model = Net()
    opt = ChainOptimizer(torch.optim.SGD, model, StepKnots(every=1), link=LinkConfig(r=1, target_modules=BODY), lr=0.1)
    model.load_state_dict(Net(seed=8).state_dict(), strict=False)
    loss_of(model, 0).backward()
    opt.step()
    opt.finish()
    fresh = Net(seed=8)
    opt.chain.apply(fresh)
    assert same(fresh, model)


BESIDE = {"biases": {"bias": "lora_only"}, "head": {"modules_to_save": ["head"]}}


@pytest.mark.parametrize("what", BESIDE)
@pytest.mark.parametrize("late", [False, True])
def test_what_is_trained_beside_the_links_is_recorded_as_it_was_in_the_base(what, late):
    """Whatever arrived before the first step is the base, also where a checkpoint was written at once."""
    model = Net(seed=8 if not late else 0)
    opt = wrap(model, **BESIDE[what])
    if late:
        model.load_state_dict(Net(seed=8).state_dict(), strict=False)
    train(opt, model, 3)
    opt.finish()
    expected = fingerprint({}, others=base_tensors(Net(seed=8))).others
    found = opt.chain.base.prints()
    assert {n: p.digest for n, p in found.items()} == {n: p.digest for n, p in expected.items()}


def test_a_save_before_the_first_step_fixes_nothing(tmp_path):
    model = Wide()
    opt = wrap(model, modules_to_save=["head"])
    opt.save(tmp_path)
    assert Chain.load(tmp_path).base.prints().keys() == set(EVERYTHING)
    other = Wide(seed=8)
    other.scale.mul_(3)
    model.load_state_dict(other.state_dict(), strict=False)
    train(opt, model, 3)
    opt.finish()
    expected = fingerprint({}, others=base_tensors(other)).others
    assert {n: p.digest for n, p in opt.chain.base.prints().items()} == {n: p.digest for n, p in expected.items()}


@pytest.mark.parametrize("way", ["save", "state_dict"])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_knows_the_base_as_it_was(way, stop, tmp_path):
    """At the first link nothing but the saved state remembers what the trained values were."""
    model = Net()
    opt = wrap(model, bias="lora_only", modules_to_save=["head"])
    train(opt, model, stop)
    resumed = Net()
    again = wrap(resumed, bias="lora_only", modules_to_save=["head"])
    if way == "save":
        opt.save(tmp_path)
        again.load(tmp_path)
    else:
        resumed.load_state_dict(copy.deepcopy(model.state_dict()))
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for run, net in ((opt, model), (again, resumed)):
        train(run, net, 4, start=stop)
        run.finish()
    assert again.chain.base == opt.chain.base
    fresh = Net()
    again.chain.apply(fresh)
    assert same(fresh, resumed)
    with pytest.raises(ValueError, match=r"'head.bias' has other values"):
        again.chain.apply(altered_head(), upto=0)


def altered_head():
    model = Net()
    with torch.no_grad():
        model.head.bias[0] += 1
    return model


def test_values_that_are_not_known_are_not_compared():
    """A framework has dropped all but the parameters' own entries in a run that had trained its head already."""
    model = Net()
    opt = wrap(model, modules_to_save=["head"])
    train(opt, model, 1)
    state = copy.deepcopy(opt.state_dict())
    counted = json.loads(state["param_groups"][0]["cola"])
    state["param_groups"][0]["cola"] = json.dumps({k: v for k, v in counted.items() if k != "origin"})
    resumed = Net()
    again = wrap(resumed, modules_to_save=["head"])
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    again.load_state_dict(state)
    train(again, resumed, 3, start=1)
    again.finish()
    assert again.chain.base.others["head.weight"].digest is None
    assert again.chain.base.others["head.weight"].shape == (3, 6)
    assert again.chain.base.others["first.bias"].digest is not None
    fresh = Net()
    again.chain.apply(fresh)
    assert same(fresh, resumed)


def test_parameters_that_are_trained_from_some_step_on():
    model = Net()
    opt = wrap(model)
    train(opt, model, 1)
    opt.add_param_group({"params": [model.head.weight], "lr": 0.1})
    train(opt, model, 2, start=1)
    opt.finish()
    assert "head.weight" in opt.chain[0].trained
    assert opt.chain.base.others["head.weight"].digest == checksum(Net().head.weight)
    fresh = Net()
    opt.chain.apply(fresh)
    assert same(fresh, model)


def test_what_another_optimizer_trains_is_the_bases_as_it_was(tmp_path):
    """The chain knows nothing of it; so a base whose own value is there is the right one."""
    model = Net()
    opt = wrap(model)
    model.head.requires_grad_(True)
    other = torch.optim.SGD(model.head.parameters(), lr=0.1)
    for step in range(3):
        train(opt, model, 1, start=step)
        other.step()
    assert not torch.equal(model.head.weight, Net().head.weight)
    opt.save(tmp_path)
    wrap(Net()).load(tmp_path)
    opt.finish()
    fresh = Net()
    opt.chain.apply(fresh)
    assert torch.equal(fresh.first.weight, model.first.weight)
    assert torch.equal(fresh.head.weight, Net().head.weight)


def test_an_adapted_weight_is_trained_by_its_links_alone():
    model = Net()
    opt = wrap(model)
    groups = len(opt.param_groups)
    for params in (model.first.weight, [model.head.weight, model.first.weight], model.first.parameters()):
        with pytest.raises(ValueError, match="param_group holds the weight of the adapted layer 'first'"):
            opt.add_param_group({"params": params})
    assert len(opt.param_groups) == groups
    assert not model.first.weight.requires_grad
    opt.add_param_group({"params": iter([model.head.weight])})
    assert len(opt.param_groups[-1]["params"]) == 1


def test_an_adapted_weight_that_another_optimizer_trains_is_the_bases_as_it_was():
    model = Net()
    opt = wrap(model)
    model.first.weight.requires_grad_(True)
    other = torch.optim.SGD([model.first.weight], lr=0.1)
    for step in range(3):
        train(opt, model, 1, start=step)
        other.step()
    opt.finish()
    assert opt.chain.base.layers["first"].digest == checksum(Net().first.weight)


# what the chain replaces may differ


def test_a_head_that_is_drawn_anew_is_no_wrong_base(tmp_path, caplog):
    """Its values in the base have no part in the result, unless no link has replaced them."""
    model = Net()
    opt = wrap(model, modules_to_save=["head"])
    train(opt, model, 3)
    opt.save(tmp_path)
    opt.finish()
    fresh, resumed = altered_head(), altered_head()
    again = wrap(resumed, modules_to_save=["head"])
    for load in (lambda: opt.chain.apply(fresh), lambda: again.load(tmp_path)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "cola"):
            load()
        assert "the base differs in head.bias, which the chain replaces" in caplog.text
    again.finish()
    assert same(fresh, model)
    assert same(resumed, model)
    with pytest.raises(ValueError, match=r"wrong base: 'head.bias' has other values"):
        opt.chain.apply(altered_head(), upto=0)
    while len(opt.chain) > 1:
        opt.chain.undo()
    with pytest.raises(ValueError, match=r"wrong base: 'head.bias' has other values"):
        opt.chain.undo(copy.deepcopy(model), altered_head())


# kinds of models


def test_tied_weights_are_recorded_under_each_name_and_may_be_stored_once():
    model = tiny_opt(tie_word_embeddings=True)
    opt = ChainOptimizer(torch.optim.SGD, model, StepKnots(every=1), link=LinkConfig(r=1), lr=0.1)
    opt.tie()
    names = {"lm_head.weight", "model.decoder.embed_tokens.weight"}
    assert names <= set(opt.chain.base.others)
    assert len({opt.chain.base.others[name].digest for name in names}) == 1
    once = {n: v for n, v in tiny_opt(tie_word_embeddings=True).state_dict().items() if n != "lm_head.weight"}
    opt.undo(once)
    opt.tie()
    opt.finish(merge=False)
    opt.chain.apply(tiny_opt(tie_word_embeddings=True))
    other = tiny_opt(tie_word_embeddings=True)
    with torch.no_grad():
        other.lm_head.weight[3, 3] += 1
    with pytest.raises(ValueError, match=r"'model.decoder.embed_tokens.weight' has other values"):
        opt.chain.apply(other)


def test_a_model_that_peft_has_wrapped_has_the_names_of_the_plain_one():
    peft = pytest.importorskip("peft")
    plain = tiny_opt(tie_word_embeddings=False)
    expected = fingerprint({}, others=base_tensors(plain)).others
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped = peft.get_peft_model(tiny_opt(tie_word_embeddings=False), config)
    assert set(base_tensors(wrapped)) == set(expected)
    ids = torch.arange(12).view(2, 6)
    opt = ChainOptimizer(torch.optim.AdamW, wrapped, StepKnots(every=1), lr=0.1)
    for _ in range(2):
        wrapped(input_ids=ids, labels=ids).loss.backward()
        opt.step()
        opt.zero_grad()
    opt.finish()
    found = opt.chain.base.prints()
    assert {n: p.digest for n, p in found.items()} == {n: p.digest for n, p in expected.items()}
    fresh = tiny_opt(tie_word_embeddings=False)
    opt.chain.apply(fresh)
    assert torch.equal(fresh.lm_head.weight, wrapped.base_model.model.lm_head.modules_to_save["default"].weight)


def test_wrappers_leave_no_trace_in_names():
    compiled = torch.compile(Net())
    assert set(base_tensors(compiled)) == set(base_tensors(nn.DataParallel(Net()))) == set(Net().state_dict())
    model = Net()
    opt = wrap(model)
    assert set(base_tensors(model)) == set(Net().state_dict())
    opt.finish()


def test_conv1d_is_recorded_as_transposed():
    model = tiny_gpt2()
    opt = ChainOptimizer(torch.optim.SGD, model, StepKnots(every=1), link=LinkConfig(r=1), lr=0.1)
    opt.tie()
    assert {x.transposed for x in opt.chain.base.layers.values()} == {True}


def test_a_tensor_made_of_others_and_one_that_is_quantised_have_digests():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = bitsandbytes.nn.Params4bit(torch.randn(64, 64), requires_grad=False).to("cpu")
    assert checksum(weight) == checksum(torch.Tensor(weight.data).to(weight.dtype))
    from torch.testing._internal.two_tensor import TwoTensor

    one, two = TwoTensor(torch.ones(2), torch.zeros(2)), TwoTensor(torch.ones(2), torch.ones(2))
    assert checksum(one) == checksum(TwoTensor(torch.ones(2), torch.zeros(2))) != checksum(two)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_torchs_own_quantised_tensors_have_digests():
    """Their bytes cannot be viewed: reading them that way ends the process."""
    one, two = (torch.quantize_per_tensor(torch.full((3,), x), 0.1, 0, torch.qint8) for x in (1.0, 2.0))
    assert checksum(one) == checksum(one.clone()) != checksum(two)


# the cost


def test_the_model_is_read_once_before_the_first_knot_and_its_layers_after_each(tmp_path, monkeypatch):
    from cola import fingerprint as module

    read, lock, original = [], threading.Lock(), module.checksum

    def counted(tensor):
        with lock:
            read.append(tuple(tensor.shape))
        return original(tensor)

    model = Net()
    opt = wrap(model)
    monkeypatch.setattr(module, "checksum", counted)
    train(opt, model, 1)
    assert not read
    opt.save(tmp_path)
    assert len(read) == len(Net().state_dict())
    opt.save(tmp_path)
    train(opt, model, 1, start=1)  # the first knot
    assert len(read) == len(Net().state_dict())
    opt.save(tmp_path)
    assert len(read) == len(Net().state_dict()) + len(BODY)
    opt.save(tmp_path), opt.state_dict(), train(opt, model, 1, start=2)
    assert len(read) == len(Net().state_dict()) + len(BODY)


def test_a_chain_without_links_costs_nothing(monkeypatch):
    monkeypatch.setattr("cola.fingerprint.checksum", lambda tensor: pytest.fail("read"))
    model = Net()
    link = LinkConfig(r=1, target_modules=BODY, bias="lora_only")
    opt = ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=link, lr=0.1, keep_links=False)
    train(opt, model, 2)
    opt.tie()
    opt.finish()


# format 1


def as_format_1(directory, kind):
    """What the same chain looked like before: digests of another kind, of the adapted layers alone."""
    path = directory / f"{kind}.json"
    content = json.loads(path.read_text())
    for name in ("sha256", "saved"):
        del content[name]
    content["version"] = 1
    chain = content["chain"] if kind == "checkpoint" else content
    base = chain["base"]
    del base["others"]
    for layer, about in base["layers"].items():
        about["digest"] = checksum_1(Net().get_submodule(layer).weight)
    path.write_bytes(files.seal(content))


def test_a_chain_of_format_1_is_read_and_its_base_still_checked(tmp_path):
    model, chain = trained()
    chain.save(tmp_path / "chain")
    as_format_1(tmp_path / "chain", "chain")
    old, fresh = Chain.load(tmp_path / "chain"), Net()
    assert old.base.others is None
    old.apply(fresh)
    assert same(fresh, model)
    with pytest.raises(ValueError, match="the weight of layer 'first' has other values"):
        old.apply(Net(seed=1))
    old.save(tmp_path / "again")
    with pytest.raises(ValueError, match="the weight of layer 'first' has other values"):
        Chain.load(tmp_path / "again").apply(Net(seed=1))


def test_a_checkpoint_of_format_1_goes_on(tmp_path):
    model = Net()
    opt = wrap(model)
    train(opt, model, 3)
    opt.save(tmp_path)
    as_format_1(tmp_path, "checkpoint")
    train(opt, model, 3, start=3)
    resumed = Net()
    again = wrap(resumed)
    again.load(tmp_path)
    train(again, resumed, 3, start=3)
    assert same(model, resumed)
    with pytest.raises(ValueError, match="the weight of layer 'first' has other values"):
        wrap(Net(seed=1)).load(tmp_path)


def test_a_state_of_format_1_goes_on_and_its_weights_are_still_compared():
    model = Net()
    opt = wrap(model)
    train(opt, model, 3)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    counted = json.loads(state["param_groups"][0]["cola"])
    counted["weights"] = digest_1({path: layer.weight for path, layer in opt.live.layers.items()}, ())
    del counted["origin"]
    state["param_groups"][0]["cola"] = json.dumps({**counted, "version": 1})
    resumed = Net()
    again = wrap(resumed)
    again.load_state_dict(state)
    with pytest.raises(RuntimeError, match="load the model's own state dict too"):
        train(again, resumed, 1, start=3)
    resumed.load_state_dict(weights)
    train(opt, model, 3, start=3), train(again, resumed, 3, start=3)
    assert same(model, resumed)
    state["param_groups"][0]["cola"] = json.dumps({**counted, "version": 3})
    with pytest.raises(ValueError, match="format 3, and this version of cola reads formats 1 and 2"):
        wrap(Net()).load_state_dict(state)
