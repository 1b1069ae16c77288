"""The recipe of the tiny models, on a few bytes."""

import math

import torch

from experiments.tiny import tiny_opt
from experiments.tiny.loss import bits_per_byte
from experiments.tiny.pretrain import Recipe, pretrain

TEXT = b"one link, then another link, then a chain. " * 60
RECIPE = Recipe(steps=150, batch_size=4, warmup=5, lr_rest=2e-2)


def trained():
    return pretrain(TEXT, RECIPE, tiny_opt.fresh(tiny_opt.config(16, 1, 2, 32), RECIPE.seed))


def test_a_pretrained_model_has_learnt_its_text_and_comes_out_the_same_again():
    before = torch.random.get_rng_state()
    model = trained()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training
    # a uniform guess takes 8 bits, the frequencies of its letters 3.5
    counts = [TEXT.count(letter) / len(TEXT) for letter in set(TEXT)]
    assert bits_per_byte(model, TEXT, 32) < -sum(share * math.log2(share) for share in counts)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), trained().parameters()))
