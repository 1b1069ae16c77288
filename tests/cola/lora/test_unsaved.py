"""save_pretrained in the middle of a link says once what it leaves out, and after the end the model has no trace."""

import copy
import inspect
import logging
import pickle
import re

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from tests.models import tiny_gpt2, tiny_mixtral, tiny_opt

pytest.importorskip("transformers")


def steps(model, opt, count, start=0):
    for number in range(start, start + count):
        ids = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(number))
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
        opt.zero_grad()


def wrap(model, policy=None, **link):
    return ChainOptimizer(
        torch.optim.AdamW, model, policy or StepKnots(every=3), link=LinkConfig(**{"r": 2, **link}), lr=0.02
    )


def words(caplog):
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name == "cola"]
    return [message for message in told if not re.match(r"link \d+ changed layer|no knot was tied", message)]


@pytest.mark.parametrize("make", [tiny_opt, tiny_gpt2])
@pytest.mark.parametrize("copying", [None, copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_trained_live_link_is_missed_once(caplog, tmp_path, make, copying):
    model = make()
    before = set(vars(model))
    opt = wrap(model)
    steps(model, opt, 4)
    if copying is not None:
        model, opt = copying((model, opt))
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    (said,) = words(caplog)
    assert "leaves out the live link 1" in said
    assert "opt.finish()" in said
    assert "opt.tie()" in said
    opt.finish()
    assert set(vars(model)) == before
    model.save_pretrained(tmp_path / "c")
    assert len(words(caplog)) == 1
    again = type(model).from_pretrained(tmp_path / "c")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters()))


def test_a_copy_of_the_model_alone_is_reminded_too(caplog, tmp_path):
    model = tiny_opt()
    opt = wrap(model)
    steps(model, opt, 1)
    twin = copy.deepcopy(model)
    assert b"ChainOptimizer" not in pickle.dumps(model)
    assert twin.save_pretrained.module is twin
    opt.finish()
    twin.save_pretrained(tmp_path)
    assert len(words(caplog)) == 1


@pytest.mark.parametrize("done", [0, 3])
def test_nothing_is_said_where_nothing_is_left_out(caplog, tmp_path, done):
    """Before the first step, right after a knot, and while a framework writes a checkpoint."""
    model = tiny_opt()
    opt = wrap(model)
    steps(model, opt, done)
    model.save_pretrained(tmp_path / "a")
    steps(model, opt, 1, start=done)
    opt.live.note.in_checkpoint = True
    model.save_pretrained(tmp_path / "b")
    opt.live.note.in_checkpoint = False
    assert not words(caplog)
    model.save_pretrained(tmp_path / "c")
    assert len(words(caplog)) == 1


def test_links_on_experts_alone_are_missed_too(caplog, tmp_path):
    model = tiny_mixtral()
    opt = wrap(model, target_modules=[], target_parameters=["down_proj"])
    steps(model, opt, 1)
    model.save_pretrained(tmp_path)
    (said,) = words(caplog)
    assert "leaves out the live link 0" in said


class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = tiny_opt()

    def forward(self, **kwargs):
        return self.net(**kwargs)


def test_a_model_inside_the_one_that_was_given_is_reminded(caplog, tmp_path):
    model = Inside()
    opt = wrap(model)
    steps(model, opt, 1)
    model.net.save_pretrained(tmp_path)
    assert len(words(caplog)) == 1
    opt.finish()
    assert not any("save_pretrained" in vars(module) for module in model.modules())


def test_it_looks_like_what_it_stands_for(tmp_path):
    model = tiny_opt()
    wanted = inspect.signature(model.save_pretrained)
    opt = wrap(model)
    assert inspect.signature(model.save_pretrained) == wanted
    assert model.save_pretrained.__name__ == "save_pretrained"
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    opt.finish()
    assert inspect.ismethod(model.save_pretrained)


def test_what_others_put_there_comes_back(tmp_path):
    model, calls = tiny_opt(), []
    model.save_pretrained = calls.append
    opt = wrap(model)
    model.save_pretrained("x")
    mine = model.save_pretrained
    model.save_pretrained = lambda where: mine(where)
    theirs = model.save_pretrained
    opt.finish()
    assert model.save_pretrained is theirs
    model.save_pretrained("y")
    assert calls == ["x", "y"]


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_an_adapter_without_the_tied_links_is_missed(caplog, tmp_path, how):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    model = tiny_opt()
    if how == "get_peft_model":
        model = peft.get_peft_model(model, config)
    else:
        model.add_adapter(config)
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), lr=0.02)
    steps(model, opt, 2)
    model.save_pretrained(tmp_path / "a")  # the first link is the adapter
    assert not words(caplog)
    opt.tie()
    model.save_pretrained(tmp_path / "b")
    (said,) = words(caplog)
    assert "without the link that is tied" in said
    assert "opt.chain.to_peft(directory)" in said
    opt.finish()
    assert "save_pretrained" not in vars(model)
