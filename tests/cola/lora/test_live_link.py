"""What leaves in mid-link has the tied links alone, and says so."""

import copy
import pickle

import pytest
import torch

from cola import Chain, ChainOptimizer, LinkConfig, NeverKnots
from tests.models import BODY, Net, train

LINK = LinkConfig(r=2, target_modules=BODY)


def running(steps=2, tied=True):
    model = Net()
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LINK, lr=0.05)
    if tied:
        train(opt, model, 2)
        opt.tie()
    if steps:
        train(opt, model, steps, start=2)
    return opt


CALLS = {
    "to_peft": lambda chain, directory: chain.to_peft(directory),
    "save": lambda chain, directory: chain.save(directory),
    "apply": lambda chain, directory: chain.apply(Net()),
}


def said(caplog):
    return [record.message for record in caplog.records if "the live link" in record.message]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_in_mid_link_says_once_that_the_live_link_is_left_out(call, tmp_path, caplog):
    opt = running()
    CALLS[call](opt.chain, tmp_path)
    (message,) = said(caplog)
    assert message.startswith(f"chain.{call}() has 1 tied link;")
    assert "opt.finish()" in message
    assert "opt.tie()" in message


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", ["finish", "drop", "tie", "not begun", "loaded"])
def test_without_a_trained_live_link_nothing_is_said(call, way, tmp_path, caplog):
    opt = running(0 if way == "not begun" else 2)
    if way == "finish":
        opt.finish()
    if way == "drop":
        opt.finish(merge=False)
    if way == "tie":
        opt.tie()
    chain = opt.chain
    if way == "loaded":
        opt.save(tmp_path / "run")
        chain = Chain.load(tmp_path / "run")
    CALLS[call](chain, tmp_path / "out")
    assert not said(caplog)


def test_a_checkpoint_holds_the_live_link_and_says_nothing(tmp_path, caplog):
    opt = running()
    opt.save(tmp_path)
    opt.state_dict()
    opt.chain.state_dict()
    opt.chain.norms()
    assert not said(caplog)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("way", ["load", "load_state_dict", "deepcopy", "pickle"])
def test_a_run_that_goes_on_knows_of_its_live_link(way, steps, tmp_path, caplog):
    opt = running(steps)
    other = ChainOptimizer(torch.optim.AdamW, Net(), NeverKnots(), link=LINK, lr=0.05)
    if way == "load":
        opt.save(tmp_path / "run")
        other.load(tmp_path / "run")
    elif way == "load_state_dict":
        other.model.load_state_dict(opt.model.state_dict())
        other.load_state_dict(opt.state_dict())
    elif way == "deepcopy":
        other = copy.deepcopy(opt)
    else:
        chain = pickle.loads(pickle.dumps(opt.chain))
        chain.to_peft(tmp_path / "out")
        assert len(said(caplog)) == bool(steps)
        return
    other.chain.to_peft(tmp_path / "out")
    assert len(said(caplog)) == bool(steps)


def test_after_an_undo_there_is_no_trained_link(tmp_path, caplog):
    opt = running()
    opt.tie()
    train(opt, opt.model, 1, start=4)
    opt.undo(Net())
    opt.chain.to_peft(tmp_path)
    assert not said(caplog)
