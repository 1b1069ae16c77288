"""Ways in which a chain could be silently wrong, each found once by trying."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from cola.knot.tie import key
from tests.models import BODY, Net, draw, loss_of, tiny_opt, train

LINK = LinkConfig(r=2, lora_alpha=2, target_modules=BODY)


def chained(model=None, policy=None, base=torch.optim.AdamW, link=LINK, **kwargs):
    model = model or Net()
    return model, ChainOptimizer(base, model, policy or NeverKnots(), link=link, **{"lr": 0.02, **kwargs})


# layers


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(16, 16))


def test_layers_that_their_parent_reads_without_calling_are_left_out_or_refused(caplog):
    """nn.TransformerEncoderLayer's fast path would show the base alone in evaluation."""
    model = encoder()
    opt = ChainOptimizer(
        torch.optim.SGD, model, NeverKnots(), link=LinkConfig(r=2, target_modules="all-linear"), lr=0.1
    )
    assert list(opt.live.layers) == ["1"]
    assert "leaves out 0.layers.0.linear1" in caplog.text
    with torch.no_grad():
        opt.live.layers["1"].lora_B.normal_(generator=torch.Generator().manual_seed(0))
    model.eval()
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    before = model(x)
    opt.finish()
    assert torch.allclose(before, model(x), atol=1e-5)
    with pytest.raises(ValueError, match=r"linear1' belongs to an nn\.TransformerEncoderLayer, whose fast path"):
        chained(encoder(), link=LinkConfig(r=2, target_modules=["linear1"]))


@pytest.mark.parametrize("view", [lambda w: w.data, lambda w: w.data.t(), lambda w: w.data[2:]])
def test_weights_that_share_memory_count_as_tied(view):
    model = Net()
    model.extra = nn.Module()
    model.extra.register_parameter("weight", nn.Parameter(view(model.first.weight)))
    with pytest.raises(ValueError, match=r"weight of 'first' is tied \(extra\.weight and first\.weight"):
        chained(model)


def test_weights_that_lie_side_by_side_in_one_buffer_are_free():
    model, buffer = Net(), torch.randn(72, generator=torch.Generator().manual_seed(0))
    model.first.weight = nn.Parameter(buffer[:36].view(6, 6))
    model.second.weight = nn.Parameter(buffer[36:].view(6, 6))
    chained(model)


def test_all_linear_leaves_out_a_head_that_is_smaller_than_the_rank(caplog):
    opt = ChainOptimizer(torch.optim.SGD, Net(out=2), NeverKnots(), link=LinkConfig(r=4, target_modules="all-linear"))
    assert list(opt.live.layers) == ["first", "second"]
    assert "leaves out head: r=4 is above its rank" in caplog.text


def test_many_layers_smaller_than_the_rank_are_left_out_with_one_warning(caplog):
    model = nn.ModuleList([nn.Linear(8, 8), *(nn.Linear(8, 1) for _ in range(24))])
    link = LinkConfig(r=4, target_modules="all-linear")
    assert list(ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=link).live.layers) == ["0"]
    assert [r.getMessage() for r in caplog.records if "leaves out" in r.getMessage()] == [
        "target_modules='all-linear' leaves out 1, 2, 3 and 21 more: r=4 is above their rank"
    ]


class Renamed(nn.Linear):
    """A subclass that changes nothing."""


@pytest.mark.parametrize(
    "copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_an_adapted_subclass_can_be_copied(copying):
    model = nn.Sequential(Renamed(4, 4))
    chained(model, link=LinkConfig(r=2, target_modules="all-linear"))
    twin = copying(model)
    assert type(twin[0]) is type(model[0])
    assert torch.equal(twin(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_a_shared_module_to_save_is_one_parameter():
    model = tiny_opt()
    link = LinkConfig(r=2, modules_to_save=["lm_head", "embed_tokens"])
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=link, lr=0.1)
    assert len(opt.param_groups[1]["params"]) == 1


# state of the base


class Momentum(torch.optim.Optimizer):
    """Keeps its state in a dict of its own and a counter on itself."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.m = {p: torch.zeros_like(p) for group in self.param_groups for p in group["params"]}
        self.n = 0

    def step(self, closure=None):
        self.n += 1
        for group in self.param_groups:
            for p in group["params"]:
                self.m[p] = 0.9 * self.m[p] + p.grad
                p.data.sub_(group["lr"] * self.m[p])


class Wrapping(torch.optim.Optimizer):
    """Holds another optimizer over the same groups, as SAM and Lookahead do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.inner = torch.optim.AdamW(self.param_groups, lr=lr)

    def step(self, closure=None):
        self.inner.step()


class TensorCounter(torch.optim.Optimizer):
    """Counts in a tensor of the group, in place."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            group.setdefault("k", torch.zeros(()))

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"].add_(1)
            for p in group["params"]:
                p.data.sub_(group["lr"] / group["k"] * p.grad)


@pytest.mark.parametrize("base", [Momentum, Wrapping, TensorCounter])
@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_state_is_reset_wherever_a_base_keeps_it(base, bias):
    """As in test_bases: after a knot the base takes the steps of a new one on the same parameters, bit for bit."""
    link = LinkConfig(r=2, lora_alpha=2, target_modules=BODY, bias=bias)
    model, opt = chained(base=base, link=link)
    train(opt, model, 4)
    opt.tie()
    twin = Net()
    owner = ChainOptimizer(torch.optim.SGD, twin, NeverKnots(), link=link, lr=0.0)
    twin.load_state_dict(model.state_dict())
    new = base(owner.live.adapters(), lr=0.02)
    mine = {id(p) for p in opt.live.adapters()}
    for step in range(4, 8):
        # the biases go on with their own state: give the twin what they became
        train(opt, model, 1, start=step)
        train(new, twin, 1, start=step)
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters()):
                if id(p) in mine:
                    assert torch.equal(p, q), step
                else:
                    q.copy_(p)
        if bias != "none":
            break  # from the second step on the twin's gradients are those of other biases
    if base is Momentum:
        assert opt.base.n == (8 if bias == "none" else 5) - (4 if bias == "none" else 0)


def test_what_shares_a_group_with_the_adapters_keeps_its_state():
    def one_group(groups):
        return torch.optim.AdamW([p for group in groups for p in group["params"]], lr=0.02)

    link = LinkConfig(r=2, target_modules=BODY, modules_to_save=["head"])
    model, opt = Net(), None
    opt = ChainOptimizer(one_group, model, StepKnots(every=5), link=link)
    train(opt, model, 7)
    assert opt.state[model.head.weight]["step"].item() == 7
    assert opt.state[model.first.lora_A]["step"].item() == 2


@pytest.mark.parametrize("where", ["closure", "hook"])
def test_a_learning_rate_set_inside_a_step_is_no_state(where):
    model, opt = chained(base=torch.optim.SGD, lr=0.1)

    def halve(*args):
        opt.param_groups[0]["lr"] /= 2

    def closure():
        opt.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        if where == "closure":
            halve()
        return loss

    if where == "hook":
        opt.base.register_step_post_hook(halve)
    opt.step(closure)
    opt.tie()
    assert opt.param_groups[0]["lr"] == 0.05


def test_counters_in_the_group_are_known_after_a_resume():
    schedulefree = pytest.importorskip("schedulefree")
    (model, opt), (resumed, again) = (chained(base=schedulefree.SGDScheduleFree, lr=0.1) for _ in range(2))
    opt.train()
    train(opt, model, 3)
    states = copy.deepcopy((model.state_dict(), opt.state_dict()))
    resumed.load_state_dict(states[0])
    again.load_state_dict(states[1])
    for o in (opt, again):
        o.tie()
    assert again.param_groups[0]["k"] == opt.param_groups[0]["k"] == 0
    assert train(again, resumed, 3, start=3) == train(opt, model, 3, start=3)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_base_with_modes_is_left_in_the_mode_it_was_in(mode, fails):
    schedulefree = pytest.importorskip("schedulefree")
    model, opt = chained(base=schedulefree.SGDScheduleFree, lr=0.1)
    opt.train()
    train(opt, model, 2)
    getattr(opt, mode)()
    if fails:
        with torch.no_grad():
            model.first.lora_A[0, 0] = float("nan")
        with pytest.raises(RuntimeError, match="is not tied"):
            opt.tie()
    else:
        opt.tie()
    assert opt.param_groups[0]["train_mode"] is (mode == "train")


def test_a_learning_rate_that_is_a_tensor_of_zero_is_a_probe_too():
    model, opt = chained(lr=torch.tensor(0.02))
    opt.param_groups[0]["lr"] = torch.tensor(0.0)
    for p in opt.live.adapters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert opt.steps == 0
    loss_of(model, 0).backward()
    opt.step()
    assert opt.steps == 1


# parameters


def test_parameters_replaced_before_the_first_step_are_trained_and_later_ones_noticed_at_once():
    (model, opt), (twin, other) = (chained(policy=StepKnots(every=100)) for _ in range(2))
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert train(opt, model, 3) == train(other, twin, 3)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match="param_groups do not hold lora_A of layer 'first'"):
        train(opt, model, 1)
    with pytest.raises(RuntimeError, match="param_groups do not hold"):
        opt.finish()


def test_a_frozen_parameter_that_is_added_is_trained_and_recorded():
    model, opt = chained()
    base = copy.deepcopy(Net())
    opt.add_param_group({"params": [model.head.weight]})
    before = model.head.weight.detach().clone()
    train(opt, model, 5)
    opt.finish()
    assert not torch.equal(model.head.weight, before)
    opt.chain.apply(base)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), model.parameters()))


def test_what_is_trained_after_the_last_knot_is_recorded_though_the_link_is_zero():
    link = LinkConfig(r=2, lora_alpha=2, target_modules=BODY, modules_to_save=["head"])
    model, opt = chained(policy=StepKnots(every=3), link=link)
    train(opt, model, 3)
    opt.param_groups[0]["lr"] = 0.0
    train(opt, model, 5, start=3)
    opt.finish()
    base = Net()
    opt.chain.apply(base)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), model.parameters()))


# ranks, scalings, draws


def test_a_masked_chain_records_each_link_at_its_own_rank_and_may_grow():
    link = LinkConfig(r=(2, 4, 1), lora_alpha=2, target_modules=BODY, rank_change="mask")
    model, opt = chained(policy=StepKnots(every=3), link=link)
    twin, other = chained(policy=StepKnots(every=3), link=LinkConfig(**{**vars(link), "rank_change": "resize"}))
    shapes = [p.shape for p in opt.live.adapters()]
    assert train(opt, model, 9) == pytest.approx(train(other, twin, 9), rel=1e-5)
    assert [p.shape for p in opt.live.adapters()] == shapes
    opt.tie()
    assert [f.A.shape[0] for f in (step.factors["first"] for step in opt.chain)][:3] == [2, 4, 1]
    assert [f.B.shape[1] for f in (step.factors["first"] for step in opt.chain)][:3] == [2, 4, 1]


@pytest.mark.parametrize("rank_change", ["resize", "mask"])
def test_scalings_that_follow_the_rank_survive_a_resume(rank_change):
    link = LinkConfig(r=(4, 2), lora_alpha=4, target_modules=BODY, scaling="alpha/r", rank_change=rank_change)
    (model, opt), (resumed, again) = (chained(policy=StepKnots(every=3), link=link) for _ in range(2))
    train(opt, model, 4)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert again.live.scaling == 2.0
    assert again.live.rank == 2
    assert train(again, resumed, 4, start=4) == train(opt, model, 4, start=4)


def test_singular_values_are_those_of_the_update_itself():
    model, opt = chained(policy=StepKnots(every=3))
    train(opt, model, 7)
    opt.finish()
    dense = torch.linalg.svdvals(opt.chain.delta("first"))
    ours = opt.chain.singular_values("first")
    assert torch.allclose(ours, dense[: len(ours)], rtol=0, atol=1e-12 * dense[0].item() * 6)


def test_orthogonal_draws_do_not_depend_on_the_sign_that_lapack_chooses():
    Q, _ = draw(LinkConfig(r=3, init="orthogonal"), (8, 8), seed=0, link=0, layer="x")
    # the draw is the one Q of QR with a positive diagonal of R: Qᵀ of the Gaussian itself is upper triangular with one
    gaussian = torch.randn(8, 3, generator=torch.Generator().manual_seed(key(0, 0, "x")))
    assert (torch.diagonal(Q @ gaussian) > 0).all()


def test_a_selector_that_has_gone_round_goes_on():
    link = LinkConfig(r=6, lora_alpha=2, target_modules=BODY, init="selector", train="B")
    model, opt = chained(policy=StepKnots(every=2), link=link)
    train(opt, model, 5)
    assert len(opt.chain) == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target_modules": [3]}, TypeError, r"target_modules=\[3\] must hold names"),
        ({"target_modules": 3}, TypeError, "target_modules=3 must be a list of names"),
        ({"modules_to_save": [3]}, TypeError, r"modules_to_save=\[3\] must hold names"),
        ({"lora_alpha": True}, ValueError, "lora_alpha=True must be a positive number"),
        ({"residual_device": "gpu0"}, ValueError, "residual_device='gpu0' is no device"),
    ],
)
def test_configurations_that_would_fail_later_fail_at_once(changes, error, message):
    with pytest.raises(error, match=message):
        LinkConfig(**changes)


def test_integers_of_other_libraries_are_integers():
    import numpy as np

    assert LinkConfig(r=np.int64(4)).rank_of(0) == 4
    assert StepKnots(at=np.array([2, 5])).at == [2, 5]


def test_the_log_is_quiet_unless_asked(caplog):
    model, opt = chained(policy=StepKnots(every=2))
    with caplog.at_level(logging.WARNING, logger="cola"):
        train(opt, model, 4)
    assert not caplog.records
