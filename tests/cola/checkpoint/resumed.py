"""Runs to be saved in the middle and resumed, one for everything that a checkpoint must hold."""

import copy

import torch
from torch import nn

from cola import ChainOptimizer, EpochKnots, LinkConfig, PlateauKnots, StepKnots
from tests.models import BODY, Net, train

KNOT, TOTAL = 4, 11  # knots after steps 4 and 8, the last link tied at the end


class Dropped(Net):
    """With dropout, so that the random state matters."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.2, self.training))


CASES = {
    "fp32": {},
    "fp64": {"dtype": torch.float64},
    "bf16 stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic"},
    "bf16 nearest": {"dtype": torch.bfloat16, "rounding": "nearest"},
    "bf16 compensated": {"dtype": torch.bfloat16, "rounding": "compensated"},
    "fp16 stochastic": {"dtype": torch.float16, "rounding": "stochastic"},
    "fp32 compensated": {"rounding": "compensated"},
    "rank step-down": {"link": {"r": (3, 2, 1)}},
    "masked ranks": {"link": {"r": (3, 2, 1), "rank_change": "mask"}},
    "callable rank": {"link": {"r": lambda link: 3 - link % 2}},
    "biases": {"link": {"r": 2, "bias": "lora_only"}},
    "head": {"link": {"r": 2, "modules_to_save": ["head"]}},
    "only A": {"link": {"r": 2, "train": "A"}},
    "only B": {"link": {"r": 2, "train": "B"}},
    "dropout": {"model": Dropped, "link": {"r": 2, "lora_dropout": 0.3}},
    "plateau": {"policy": lambda: PlateauKnots(patience=0, window=2, threshold=0.5)},
    "either": {"policy": lambda: StepKnots(at=[KNOT]) | EpochKnots(at=[2], steps_per_epoch=KNOT)},
    "SGD": {"base": torch.optim.SGD, "kwargs": {"lr": 0.05, "momentum": 0.9}},
    "Adafactor": {"base": torch.optim.Adafactor, "kwargs": {"lr": 0.05}},
    "NAdam": {"base": torch.optim.NAdam, "kwargs": {"lr": 0.02}},
    "ASGD": {"base": torch.optim.ASGD, "kwargs": {"lr": 0.02}},
    "Rprop": {"base": torch.optim.Rprop, "kwargs": {"lr": 0.02}},
    "tensor lr": {"kwargs": {"lr": torch.tensor(0.02)}},
}


def wrap(model, case, **changes):
    case = {**CASES[case], **changes}
    link = LinkConfig(**{"r": 2, "target_modules": BODY, **case.get("link", {})})
    policy = case.get("policy", lambda: StepKnots(every=KNOT))()
    kwargs = copy.deepcopy(case.get("kwargs", {"lr": 0.02}))
    rounding, seed = case.get("rounding", "auto"), case.get("seed", 3)
    return ChainOptimizer(
        case.get("base", torch.optim.AdamW), model, policy, link=link, rounding=rounding, seed=seed, **kwargs
    )


def made(case, seed=0):
    dtype = CASES[case].get("dtype", torch.float32)
    return CASES[case].get("model", Net)(seed=seed, dtype=dtype), dtype


def same(one, other):
    """Equal keys, dtypes and bits."""
    a, b = dict(one), dict(other)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def undisturbed(case, steps):
    """Weights and chain of a run, and its model and optimizer after ``steps``."""
    model, dtype = made(case)
    opt = wrap(model, case)
    train(opt, model, steps, dtype=dtype)
    return model, opt, dtype
