"""The coverage of a chain: every parameter counted once, at every stage of the optimizer's life."""

import dataclasses
import logging

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, StepKnots
from tests.models import BODY, Net, tiny_gpt2, tiny_opt, train


def chained(model, targets, **link):
    link = LinkConfig(**{"r": 2, "target_modules": targets, **link})
    return ChainOptimizer(torch.optim.SGD, model, StepKnots(every=2), link=link, lr=0.1)


def test_it_counts_each_parameter_once():
    """Worked by hand: two 6x6 layers, a 3x6 head, biases of 6 and 3."""
    found = chained(Net(), BODY).coverage()
    assert (found.layers, found.parameters, found.total, found.trained) == (2, 72, 99, 0)
    assert found.share == 72 / 99
    assert [(row.part, row.name, row.layers, row.parameters) for row in found.rows] == [
        ("", "first", 1, 36), ("", "second", 1, 36),
    ]  # fmt: skip
    assert {one.group: one.parameters for one in found.left_out} == {"other linear layers": 18, "norms and biases": 9}


@pytest.mark.parametrize(("make", "targets"), [(tiny_opt, None), (tiny_opt, "all-linear"), (tiny_gpt2, "all-linear")])
@pytest.mark.parametrize("link", [{}, {"bias": "lora_only"}, {"modules_to_save": ["embed_positions", "wpe"]}])
def test_reached_trained_and_left_make_up_the_model(make, targets, link):
    model = make()
    total = sum(p.numel() for p in model.parameters())
    if "modules_to_save" in link:
        link = {"modules_to_save": ["wpe" if make is tiny_gpt2 else "embed_positions"]}
    found = chained(model, targets, **link).coverage()
    assert found.total == total
    assert found.parameters + found.trained + sum(one.parameters for one in found.left_out) == total
    assert bool(found.trained) == bool(link)


def test_it_is_the_same_at_every_stage():
    model = Net()
    opt = chained(model, BODY)
    first = opt.coverage()
    train(opt, model, 3)
    assert opt.coverage() == first
    opt.finish()
    assert opt.coverage() == first
    assert opt.finished


def test_parameters_added_later_count_as_trained():
    opt = chained(Net(), BODY)
    opt.add_param_group({"params": list(opt.model.head.parameters())})
    assert opt.coverage().trained == 21
    assert {one.group for one in opt.coverage().left_out} == {"norms and biases"}


def test_it_is_frozen_and_reads_as_a_table():
    found = chained(tiny_opt(), None).coverage()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.total = 0
    text = str(found)
    assert text.splitlines()[0] == found.summary().split(";")[0]
    assert "model.decoder.layers: q_proj: 2 layers, 512" in text
    assert "embeddings" in text


def test_it_is_logged_once_and_a_small_share_of_all_linear_is_a_warning(caplog):
    wide = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8))
    with caplog.at_level(logging.INFO, "cola"):
        chained(wide, "all-linear")
    infos, warnings = ([r for r in caplog.records if r.levelno == level] for level in (logging.INFO, logging.WARNING))
    assert len(infos) == 1
    assert len(warnings) == 1
    assert "embeddings 91.7 %" in warnings[0].getMessage()
    caplog.clear()
    chained(Net(), "all-linear")
    assert not caplog.records


@pytest.mark.parametrize(
    ("link", "warned"),
    [({}, True), ({"r": (2, 1)}, True), ({"exclude_modules": ["0", "1"]}, False), ({"train": "both"}, False)],
)
def test_a_selector_on_embeddings_is_a_warning_with_its_share(link, warned, caplog):
    tables = nn.Sequential(nn.Embedding(40, 8), nn.Embedding(30, 8), nn.Linear(8, 8))
    chained(tables, "all", **{"init": "selector", "train": "B", **link})
    said = [r.getMessage() for r in caplog.records if "selector" in r.getMessage()]
    assert len(said) == warned
    if warned:
        assert "a link trains 2 of the 40 rows of '0' (5 %)" in said[0]
        assert "exclude_modules" in said[0]
        assert "trainable_token_indices" in said[0]
