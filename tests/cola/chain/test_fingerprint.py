"""The fingerprint sees every change of a base, wherever in it that is, and nothing else; a wrong base is refused."""

import copy
import json
import logging
import threading

import pytest
import torch
from torch import nn

from cola import Chain, ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from cola.chain.fingerprint import Fingerprint, checksum, prints_of
from cola.lora.names import base_tensors
from tests.cola.checkpoint.bases_of_chains import EVERYTHING, Wide, altered_head, same, trained, wrap
from tests.models import BODY, Net, tiny_gpt2, tiny_opt, train


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
    expected = prints_of(base_tensors(plain))
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
    from cola.chain import fingerprint as module

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
    monkeypatch.setattr("cola.chain.fingerprint.checksum", lambda tensor: pytest.fail("read"))
    model = Net()
    link = LinkConfig(r=1, target_modules=BODY, bias="lora_only")
    opt = ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=link, lr=0.1, keep_links=False)
    train(opt, model, 2)
    opt.tie()
    opt.finish()
