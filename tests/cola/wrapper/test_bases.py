"""Every optimizer of torch.optim as a base, and a reset that is exact for each: tables."""

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from tests.models import BODY, Net, closure_steps, loss_of, train

LINK = LinkConfig(r=2, lora_alpha=2, target_modules=BODY)

# every optimizer class, and the variants whose state is kept or touched differently
TABLE = {
    "ASGD": [{"lr": 0.05, "t0": 1}, {"lr": 0.05, "foreach": True}],
    "Adadelta": [{"lr": 1.0}, {"lr": 1.0, "foreach": True}],
    "Adafactor": [{"lr": 0.05}, {"lr": 0.05, "foreach": True}],
    "Adagrad": [
        {"lr": 0.1}, {"lr": 0.1, "initial_accumulator_value": 0.3, "lr_decay": 0.1}, {"lr": 0.1, "foreach": True},
        {"lr": 0.1, "fused": True},
    ],
    "Adam": [{"lr": 0.02}, {"lr": 0.02, "amsgrad": True}, {"lr": 0.02, "foreach": True}, {"lr": 0.02, "fused": True}],
    "AdamW": [
        {"lr": 0.02}, {"lr": torch.tensor(0.02)}, {"lr": 0.02, "foreach": True}, {"lr": 0.02, "fused": True},
        {"lr": 0.02, "maximize": True},
    ],
    "Adamax": [{"lr": 0.02}, {"lr": 0.02, "foreach": True}],
    "LBFGS": [{"lr": 0.3, "max_iter": 3}, {"lr": 1.0, "max_iter": 3, "line_search_fn": "strong_wolfe"}],
    "Muon": [{"lr": 0.02}],
    "NAdam": [{"lr": 0.02}, {"lr": 0.02, "foreach": True}],
    "RAdam": [{"lr": 0.02}, {"lr": 0.02, "foreach": True}],
    "RMSprop": [{"lr": 0.01, "momentum": 0.5, "centered": True}, {"lr": 0.01, "foreach": True}],
    "Rprop": [{"lr": 0.01}, {"lr": 0.01, "foreach": True}],
    "SGD": [
        {"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.1, "momentum": 0.9, "foreach": True},
        {"lr": 0.1, "momentum": 0.9, "fused": True},
    ],
}  # fmt: skip
REFUSED = {"SparseAdam"}
CASES = [
    pytest.param(getattr(torch.optim, name, None), kwargs, id=f"{name}-{'-'.join(map(str, kwargs))}")
    for name, variants in TABLE.items()
    for kwargs in variants
    if hasattr(torch.optim, name)  # Muon and Adafactor are younger than the oldest torch that is supported
]


def test_the_table_holds_every_optimizer_class_of_torch():
    found = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    assert found <= TABLE.keys() | REFUSED


@pytest.mark.parametrize(
    ("kwargs", "init", "warns"),
    [({}, "kaiming", True), ({"eps": (None, 0.1)}, "kaiming", True), ({"eps": (None, 1.0)}, "kaiming", False),
     ({}, "two-sided", False),
     ({}, lambda s: (torch.ones(s.rank, s.shape[1]), torch.ones(s.shape[0], s.rank)), False)],
)  # fmt: skip
def test_relative_steps_are_warned_of_where_a_factor_starts_at_zero(kwargs, init, warns, caplog):
    link = LinkConfig(r=2, lora_alpha=2, target_modules=BODY, init=init)
    opt = ChainOptimizer(torch.optim.Adafactor, Net(), StepKnots(every=3), link=link, **kwargs)
    opt.tie()
    assert caplog.text.count("pass eps=(None, 1.0)") == warns


@pytest.mark.parametrize(("base", "kwargs"), CASES)
def test_every_base_trains_ties_and_finishes(base, kwargs):
    model = Net()
    opt = ChainOptimizer(base, model, StepKnots(every=3), link=LINK, **kwargs)
    assert isinstance(opt, torch.optim.Optimizer)
    assert isinstance(opt.base, base)
    before = loss_of(model, 0).item()
    for _ in range(8):
        closure_steps(opt, model, 1, start=0)
    opt.finish()
    assert len(opt.chain) == 3
    after = loss_of(model, 0).item()
    assert after > before if kwargs.get("maximize") else after < before
    assert type(model.first) is nn.Linear


@pytest.mark.parametrize(("base", "kwargs"), CASES)
def test_after_a_knot_the_base_behaves_as_if_it_were_new(base, kwargs):
    """A second base, made on copies of the new link's adapters, takes the same steps bit for bit."""
    model, twin = Net(), Net()
    opt = ChainOptimizer(base, model, NeverKnots(), link=LINK, **kwargs)
    closure_steps(opt, model, 4)
    opt.tie()
    owner = ChainOptimizer(torch.optim.SGD, twin, NeverKnots(), link=LINK, lr=0.0)
    twin.load_state_dict(model.state_dict())
    new = base(owner.live.adapters(), **kwargs)
    for step in range(4, 9):
        closure_steps(opt, model, 1, start=step)
        closure_steps(new, twin, 1, start=step)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters())), step


@pytest.mark.parametrize(("base", "kwargs"), CASES)
def test_parameters_and_groups_keep_their_identity_and_options(base, kwargs):
    model = Net()
    opt = ChainOptimizer(base, model, NeverKnots(), link=LINK, **kwargs)
    closure_steps(opt, model, 2)
    groups = opt.param_groups
    params = [p for g in groups for p in g["params"]]
    options = [{k: v for k, v in g.items() if k != "params"} for g in groups]
    opt.tie()
    assert opt.param_groups is groups
    assert all(a is b for a, b in zip(params, (p for g in opt.param_groups for p in g["params"])))
    assert [{k: v for k, v in g.items() if k != "params"} for g in groups] == options
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_bases_say_why_and_leave_the_model_alone(name):
    model = Net()
    with pytest.raises(ValueError, match=f"base={name} needs sparse gradients"):
        ChainOptimizer(getattr(torch.optim, name), model, NeverKnots(), link=LINK, lr=0.1)
    assert type(model.first) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_lbfgs_refuses_a_second_group_and_leaves_the_model_alone():
    model = Net()
    with pytest.raises(ValueError, match="parameter groups"):
        ChainOptimizer(
            torch.optim.LBFGS, model, NeverKnots(), link=LinkConfig(r=2, target_modules=BODY, bias="lora_only")
        )
    assert type(model.first) is nn.Linear


def test_lbfgs_survives_a_change_of_rank():
    model = Net()
    opt = ChainOptimizer(torch.optim.LBFGS, model, StepKnots(every=2), link=LinkConfig(r=(3, 1), target_modules=BODY))
    closure_steps(opt, model, 6)
    opt.finish()
    assert len(opt.chain) == 3


def test_a_callable_makes_the_base_anew_at_each_knot():
    made = []

    def factory(groups):
        made.append(torch.optim.AdamW(groups, lr=0.02))
        return made[-1]

    model = Net()
    opt = ChainOptimizer(factory, model, StepKnots(every=2), link=LINK)
    train(opt, model, 5)
    assert opt.base is made[0]
    assert len(made) == 3


def test_what_is_trained_beside_the_adapters_keeps_its_state():
    model = Net()
    link = LinkConfig(r=2, target_modules=BODY, bias="lora_only", modules_to_save=["head"])
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=5), link=link, lr=0.02)
    assert [len(g["params"]) for g in opt.param_groups] == [4, 3]  # A, B twice; first.bias, head.weight, head.bias
    train(opt, model, 7)
    assert {opt.state[p]["step"].item() for p in opt.param_groups[0]["params"]} == {2}
    assert {opt.state[p]["step"].item() for p in opt.param_groups[1]["params"]} == {7}
    opt.finish()
    assert set(opt.chain[-1].trained) == {"first.bias", "head.weight", "head.bias"}
    fresh = Net()
    opt.chain.apply(fresh)
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), model.parameters()))


class CountsInGroup(torch.optim.Optimizer):
    """Keeps its state in the group, as schedule-free and Prodigy do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": 0, "d": 1.0, "history": (), "flag": False})

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["d"] *= 1.5
            group["history"] = (*group["history"], group["k"])
            for p in group["params"]:
                p.data.sub_(group["lr"] / group["k"] * p.grad)


def test_counters_in_the_group_are_reset_and_settings_are_not():
    model = Net()
    opt = ChainOptimizer(CountsInGroup, model, NeverKnots(), link=LINK, lr=0.1)
    train(opt, model, 3)
    group = opt.param_groups[0]
    group["lr"], group["mine"], group["flag"] = 0.05, "kept", True  # a scheduler's and a user's doing
    assert group["k"] == 3
    opt.tie()
    assert (group["k"], group["d"], group["history"]) == (0, 1.0, ())
    assert (group["lr"], group["mine"], group["flag"]) == (0.05, "kept", True)


def test_schedule_free_keeps_the_evaluation_loss_across_a_knot():
    schedulefree = pytest.importorskip("schedulefree")
    model = Net(dtype=torch.float64)
    opt = ChainOptimizer(schedulefree.AdamWScheduleFree, model, NeverKnots(), link=LINK, lr=0.02, warmup_steps=2)
    opt.train()
    train(opt, model, 9, dtype=torch.float64)
    opt.eval()
    before = loss_of(model, 50, torch.float64).item()
    opt.train()
    opt.tie()
    assert opt.param_groups[0]["k"] == 0
    assert opt.param_groups[0]["train_mode"] is True
    opt.eval()
    assert loss_of(model, 50, torch.float64).item() == pytest.approx(before, rel=1e-12)
    opt.train()
    train(opt, model, 9, start=9, dtype=torch.float64)
    opt.eval()
    shown = loss_of(model, 50, torch.float64).item()
    opt.finish()
    assert loss_of(model, 50, torch.float64).item() == pytest.approx(shown, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda g: None, set()),
        (lambda g: g.update(lr=0.5, betas=(0.1, 0.2)), set()),  # settings, whoever writes them
        (lambda g: g.update(k=1), {"k"}),
        (lambda g: g.update(k=float("0")), set()),  # another object of the same value
        (lambda g: g["d"].add_(1), {"d"}),
        (lambda g: g.update(d=g["d"].clone()), {"d"}),
        (lambda g: g.update(new=None), {"new"}),
        (lambda g: g.update(other=g.pop("k")), {"other"}),  # as many entries, of the same values
        (lambda g: g.update(d=3.0), {"d"}),
    ],
)
def test_group_entries_that_a_step_changes(change, found):
    from cola.knot.reset import GroupWatch

    for tensor in (True, False):
        group = {"lr": 0.1, "betas": (0.9, 0.99), "k": 0.0}
        if tensor:
            group["d"] = torch.zeros(2)
        elif "d" in found:
            continue
        watch = GroupWatch()
        before = watch.before([group])
        change(group)
        watch.after(before, [group])
        assert watch.changed == found
