"""What a policy is told: the loss of a step, whichever way it came, and the epoch; and what it makes of them."""

import pytest
import torch

from cola import ChainOptimizer, KnotPolicy, LinkConfig, NeverKnots, PlateauKnots, Signal, StepKnots
from cola.common.distributed import agreed_mean
from tests.cola.chain.chained import chained
from tests.models import loss_of, tiny_opt, train


def test_accumulation_counts_optimizer_steps_and_averages_losses():
    losses = []
    policy = PlateauKnots(window=1)
    policy.update = lambda signal: losses.append(signal.loss.item()) or False
    model = tiny_opt()
    opt = ChainOptimizer(torch.optim.SGD, model, policy, link=LinkConfig(r=2), lr=0.0)
    ids = torch.arange(24).view(2, 12) % 32
    micro = [model(input_ids=ids, labels=ids).loss, model(input_ids=ids.flip(1), labels=ids.flip(1)).loss]
    sum(micro).backward()
    opt.step()
    assert opt.steps == 1
    assert losses == pytest.approx([sum(x.item() for x in micro) / 2])


def test_only_a_loss_that_is_backpropagated_counts():
    model, policy = tiny_opt(), Sees()
    opt = ChainOptimizer(torch.optim.SGD, model, policy, link=LinkConfig(r=2), lr=0.1)
    ids = torch.arange(12).view(1, 12)
    model.eval()
    model(input_ids=ids, labels=ids)
    model.train()
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    model(input_ids=ids)
    model(input_ids=ids.flip(1), labels=ids.flip(1))  # a look at the loss in training mode
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    opt.step()
    assert policy.losses == [loss.item()]
    opt.finish()
    assert not model._forward_hooks


def test_closure_and_told_losses_reach_the_policy():
    seen = []
    policy = NeverKnots()
    policy.update = lambda signal: seen.append(float(signal.loss)) or False
    model, opt = chained(policy=policy)

    def closure():
        opt.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    value = opt.step(closure)
    assert seen == [value.item()]
    loss_of(model, 1).backward()
    opt.observe(3.0), opt.observe(torch.tensor([5.0]))
    opt.step()
    assert seen[1] == 4.0
    with pytest.raises(ValueError, match=r"observe\(loss\) needs one number, got a tensor of shape \(2,\)"):
        opt.observe(torch.zeros(2))


class Sees(KnotPolicy):
    """Keeps what it is told."""

    def __init__(self):
        self.losses, self.epochs = [], []

    def update(self, signal):
        self.losses.append(None if signal.loss is None else float(signal.loss))
        self.epochs.append(signal.epoch)
        return False


def test_what_the_caller_tells_replaces_what_was_seen():
    model, policy = tiny_opt(), Sees()
    opt = ChainOptimizer(torch.optim.SGD, model, policy, link=LinkConfig(r=2), lr=0.1)
    ids = torch.arange(12).view(1, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    opt.observe(0.9)
    opt.step()
    assert policy.losses == [pytest.approx(0.9)]


def test_a_closure_that_runs_the_model_many_times_gives_the_loss_it_returns():
    model, policy = tiny_opt(), Sees()
    opt = ChainOptimizer(torch.optim.LBFGS, model, policy, link=LinkConfig(r=2), lr=0.1, max_iter=4)
    ids = torch.arange(12).view(1, 12)

    def closure():
        opt.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    returned = opt.step(closure)
    assert policy.losses == [pytest.approx(returned.item())]


def test_a_closure_may_return_what_is_no_loss():
    model, opt = chained(policy=Sees())

    def closure():
        opt.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss, {"accuracy": 1.0}

    opt.step(closure)
    assert opt.policy.losses == [None]


@pytest.mark.parametrize("bad", ["x", [1.0], {"loss": 1.0}])
def test_a_loss_that_is_no_number_is_refused_when_it_is_told(bad):
    _, opt = chained()
    with pytest.raises(TypeError, match=r"observe\(loss=.*needs a number"):
        opt.observe(bad)


def test_epochs_survive_a_resume():
    (model, opt), (resumed, again) = (chained(policy=Sees()) for _ in range(2))
    opt.observe(epoch=2.5)
    train(opt, model, 1)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(opt.state_dict())
    train(again, resumed, 1, start=1)
    assert again.policy.epochs == [2.5, 2.5]


def test_plateau_misses_its_loss_even_if_other_policies_tie():
    policy = StepKnots(every=5) | PlateauKnots(window=20)
    for step in range(1, 20):
        if policy.update(Signal(step)):
            policy.knotted(step)
    with pytest.raises(RuntimeError, match="PlateauKnots has seen 20 steps"):
        policy.update(Signal(20))


def test_plateau_says_at_the_first_step_that_no_loss_reaches_it(caplog):
    model, policy = tiny_opt(), PlateauKnots(window=3)
    opt = ChainOptimizer(torch.optim.SGD, model, policy, link=LinkConfig(r=2), lr=0.1)
    ids = torch.arange(12).view(1, 12)
    model(input_ids=ids, labels=ids).logits.logsumexp(-1).mean().backward()  # a loss of one's own
    opt.step(), opt.step()
    with pytest.raises(RuntimeError, match=r"3 steps \(a whole window\) and no loss: call opt.observe\(loss\)"):
        opt.step()
    assert [r.getMessage()[:43] for r in caplog.records] == ["PlateauKnots saw no loss at the first step:"]


def test_plateau_on_negative_losses_asks_for_a_real_improvement():
    policy = PlateauKnots(window=1, patience=0, threshold=0.1)
    fired = [policy.update(Signal(i, None, torch.tensor(loss))) for i, loss in enumerate([-1.0, -1.05])]
    assert fired == [False, True]  # 5 % better is not 10 % better


def test_agreed_means_leave_out_what_is_not_finite():
    assert agreed_mean(torch.tensor([1.0, float("inf"), 3.0, float("nan")])) == 2.0
    assert agreed_mean(torch.tensor([float("inf")])) != agreed_mean(torch.tensor([float("inf")]))


def test_policy_state_with_keys_that_json_would_change_is_refused():
    policy = Sees()
    policy.at = {3: True}
    with pytest.raises(TypeError, match=r"Sees\.at={3: True} cannot be saved as JSON"):
        policy.state_dict()
