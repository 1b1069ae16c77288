"""What each method trains and when it ties."""

import pytest
import torch

from cola import ChainOptimizer, EpochKnots, EvenKnots, NeverKnots, PlateauKnots, Signal, StepKnots
from experiments.methods import Method
from experiments.tiny import tiny_opt


@pytest.mark.parametrize(
    ("links", "epochs", "knots"),
    [(2, 5, [3]), (3, 5, [2, 4]), (5, 5, [1, 2, 3, 4]), (2, 2, [1]), (3, 3, [1, 2]), (2, 4, [2])],
)
def test_a_chain_parts_the_epochs(links, epochs, knots):
    """The first row is the paper's."""
    assert Method.cola(links).knot_epochs(epochs) == knots


def test_told_epochs_end_where_they_do_although_steps_were_left_out():
    """Of ten steps an epoch the first two overflowed: the optimizer's step 8 ends the first epoch."""
    told = [Signal(step, epoch=(step + 2) / 10) for step in range(1, 49)]
    for told_epochs, knots in ((True, [18, 38]), (False, [20, 40])):
        policy = Method.cola(3).policy(5, 10, told=told_epochs)
        assert [signal.step for signal in told if policy.update(signal)] == knots


def test_more_links_than_epochs_are_refused():
    with pytest.raises(ValueError, match=r"links=3 in epochs=2.*knots='even'"):
        Method.cola(3).policy(2, 10)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (Method.lora(), NeverKnots),
        (Method.cola(2), EpochKnots),
        (Method.cola(3, knots="even"), EvenKnots),
        (Method.cola(4, knots="plateau"), PlateauKnots),
        (Method.cola(2, knots="at=3,7"), StepKnots),
        (Method.cola(2, knots="every=5"), StepKnots),
    ],
)
def test_policies(method, kind):
    assert type(method.policy(5, 10)) is kind


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (Method.lora(), "lora-r8"),
        (Method.lora(16, base="SGD"), "sgd-lora-r16"),
        (Method.cola(3), "cola3-r8"),
        (Method.cola(2, ranks=(8, 4), base="Adagrad"), "adagrad-cola2-r8.4"),
        (Method.cola(5, knots="plateau"), "cola-plateau5-r8"),
        (Method.cola(2, knots="at=3,7"), "cola-at3.7-2-r8"),
        (Method("lora", alpha=8), "lora-r8-a8"),
        (Method("finetune"), "finetune"),
        (Method("icl"), "icl"),
    ],
)
def test_names(method, name):
    assert method.name == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "qlora"}, "kind='qlora'"),
        ({"kind": "lora", "base": "Lion"}, "base='Lion'"),
        ({"kind": "galore", "base": "Adafactor"}, "leave out base='Adafactor'"),
        ({"kind": "peft", "base": "SGD"}, "leave out base='SGD'"),
        ({"kind": "lora", "links": 2}, "one link"),
        ({"kind": "lora", "ranks": (8, 4)}, "one link"),
        ({"kind": "cola"}, "two or more"),
        ({"kind": "cola", "links": 0}, "links=0"),
        ({"kind": "cola", "links": 2, "ranks": (0,)}, "r=0"),
        ({"kind": "cola", "links": 2, "ranks": ()}, "r="),
        ({"kind": "lora", "alpha": -1}, "lora_alpha=-1"),
        ({"kind": "cola", "links": 2, "knots": "often"}, "knots='often'"),
        ({"kind": "cola", "links": 2, "knots": "at=3,2"}, "knots='at=3,2'"),
        ({"kind": "cola", "links": 2, "knots": "every=x"}, "knots='every=x'"),
    ],
)
def test_methods_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Method(**arguments)


@pytest.mark.parametrize("base", ["AdamW", "SGD", "Adagrad"])
def test_optimizers(base):
    def make():
        return tiny_opt.fresh(tiny_opt.config(width=16, layers=1, heads=2, context=8), 0)

    common = {"lr": 1e-3, "seed": 0, "epochs": 5, "steps_per_epoch": 4}
    whole = Method("finetune", base).optimizer(make(), **common)
    assert type(whole).__name__ == base
    assert sum(p.numel() for p in whole.param_groups[0]["params"]) == sum(p.numel() for p in make().parameters())
    chain = Method("cola", base, (4, 2), 2, init="orthogonal").optimizer(make(), **common, bias=True)
    assert isinstance(chain, ChainOptimizer)
    assert type(chain.base).__name__ == base
    assert (chain.live.scaling, chain.live.config.init) == (16 / 4, "orthogonal")
    assert sum(p.numel() for p in chain.param_groups[1]["params"]) == 2 * 16  # the biases of q and v
    for optimizer in (whole, chain):
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_prompting_has_no_optimizer():
    with pytest.raises(ValueError, match="trains nothing"):
        Method("icl").optimizer(torch.nn.Linear(1, 1), lr=1.0, seed=0, epochs=1, steps_per_epoch=1)
