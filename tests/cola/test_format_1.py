"""What earlier versions wrote in format 1 is read, and its base still checked."""

import copy
import json

import pytest

from cola import Chain, files
from cola.fingerprint import checksum_1, digest_1
from tests.cola.bases_of_chains import same, trained, wrap
from tests.models import Net, train


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
