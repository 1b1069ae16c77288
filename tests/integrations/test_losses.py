"""Every loop shows a policy, and records, the mean loss that each optimizer step has optimised."""

import pytest
import torch

from cola import ChainOptimizer, KnotPolicy, LinkConfig, PlateauKnots, Signal
from tests.models import tiny_opt

transformers = pytest.importorskip("transformers")

LINK = LinkConfig(r=2, lora_alpha=2)


class Sees(KnotPolicy):
    """Keeps what it is told, and ties twice."""

    def __init__(self):
        self.losses = []

    def update(self, signal):
        self.losses.append(float(signal.loss))
        return signal.step in (1, 3)


class Fallen(KnotPolicy):
    """A user's own: ties when the loss is lower than at the step before."""

    def __init__(self):
        self.last = 0.0

    def update(self, signal):
        before, self.last = self.last, float(signal.loss)
        return self.last < before


POLICIES = {
    "recording": Sees,
    "plateau": lambda: PlateauKnots(window=1, patience=0, threshold=0.002),
    "own": Fallen,
}


def knots_of(policy, losses):
    """The steps after which ``policy`` ties, if it is shown these losses."""
    knots = []
    for step, loss in enumerate(losses, 1):
        if policy.update(Signal(step, None, torch.tensor(loss, dtype=torch.float32))):
            policy.knotted(step)
            knots.append(step)
    return knots


def batches(n, size=2):
    """Token batches; rows of different lengths, so that means of means are not the mean."""
    generator = torch.Generator().manual_seed(3)
    for i in range(n):
        ids = torch.randint(3, 32, (size, 12), generator=generator)
        labels = ids.clone()
        labels[:, 3 + 2 * (i % 4) :] = -100
        yield {"input_ids": ids, "labels": labels}


def windows(n, of=2):
    """Accumulation windows; the last one is short."""
    found = list(batches(n))
    return [found[i : i + of] for i in range(0, n, of)]


def chained(policy, model=None, base=torch.optim.AdamW, **kwargs):
    model = model or tiny_opt()
    return model, ChainOptimizer(base, model, policy, link=LINK, **{"lr": 0.02, **kwargs})


def mean(losses):
    return sum(torch.as_tensor(loss).item() for loss in losses) / len(losses)


# Each loop trains with a policy and returns the optimizer and the mean loss of each step, taken where it is computed.
LOOPS = {}


def loop(fn):
    LOOPS[fn.__name__] = fn
    return fn


@loop
def plain(policy):
    model, opt = chained(policy)
    losses = []
    for batch in batches(6):
        loss = model(**batch).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return opt, losses


def accumulating(policy, divide, zero=lambda opt: opt.zero_grad(), **labels):
    model, opt = chained(policy)
    losses = []
    for window in windows(9):
        zero(opt)
        found = []
        for batch in window:
            loss = model(**batch, **labels).loss
            found.append(loss.item())
            divide(loss, len(window)).backward()
        opt.step()
        losses.append(mean(found))
    return opt, losses


@loop
def accumulation_divided(policy):
    return accumulating(policy, lambda loss, n: loss / n)


@loop
def accumulation_divided_by_two_in_a_short_window_too(policy):
    return accumulating(policy, lambda loss, n: loss / 2)


@loop
def accumulation_undivided(policy):
    return accumulating(policy, lambda loss, n: loss)


@loop
def accumulation_divided_in_place(policy):
    return accumulating(policy, torch.Tensor.div_)


@loop
def accumulation_with_the_models_own_zero_grad(policy):
    return accumulating(policy, lambda loss, n: loss / n, lambda opt: opt.model.zero_grad())


@loop
def accumulation_of_tuples(policy):
    model, opt = chained(policy)
    losses = []
    for window in windows(8):
        found = [model(**batch, return_dict=False)[0] for batch in window]
        sum(found).backward()  # one backward for both
        opt.step()
        opt.zero_grad()
        losses.append(mean(found))
    return opt, losses


@loop
def accumulation_by_tokens(policy):
    """Shares of the window's mean, which are added up."""
    model, opt = chained(policy)
    losses = []
    for window in windows(9):
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
        found = []
        for batch in window:
            loss = model(**batch, num_items_in_batch=items).loss
            loss.backward()
            found.append(loss.item())
        opt.step()
        opt.zero_grad()
        losses.append(sum(found))
    return opt, losses


@loop
def unequal_weights(policy):
    model, opt = chained(policy)
    losses = []
    for one, two in windows(8):
        first, second = model(**one).loss, model(**two).loss
        (0.75 * first + 0.25 * second).backward()
        opt.step()
        opt.zero_grad()
        losses.append((0.75 * first + 0.25 * second).item())
    return opt, losses


@loop
def backward_twice(policy):
    model, opt = chained(policy)
    losses = []
    for one, two in windows(8):
        first, second = model(**one).loss, model(**two).loss
        first.backward(retain_graph=True)
        first.backward()
        second.backward()
        opt.step()
        opt.zero_grad()
        losses.append((2 * first + second).item() / 3)
    return opt, losses


@loop
def with_passes_that_train_nothing(policy):
    model, opt = chained(policy)
    losses = []
    for one, two in windows(8):
        model(**two)
        opt.zero_grad()
        loss = model(**one).loss
        loss.backward()
        model(**two)
        opt.step()
        losses.append(loss.item())
    return opt, losses


@loop
def own_loss_told(policy):
    model, opt = chained(policy)
    losses = []
    for batch in batches(6):
        logits = model(**batch).logits[:, :-1]
        labels = batch["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, label_smoothing=0.1)
        opt.observe(loss)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return opt, losses


@loop
def own_loss_told_where_the_models_is_trained_too(policy):
    model, opt = chained(policy)
    losses = []
    for batch in batches(6):
        output = model(**batch)
        loss = output.loss + 1e-3 * output.logits.square().mean()
        loss.backward()
        opt.observe(loss)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return opt, losses


@loop
def closure(policy):
    model, opt = chained(policy)
    losses = []
    for batch in batches(6):

        def run(batch=batch):
            opt.zero_grad()
            output = model(**batch)
            loss = output.loss + 1e-3 * output.logits.square().mean()
            loss.backward()
            return loss

        losses.append(opt.step(run).item())
    return opt, losses


def closure_over_windows(policy, base, value, **kwargs):
    model, opt = chained(policy, base=base, **kwargs)
    losses = []
    for window in windows(7):
        runs = []

        def run(window=window, runs=runs):
            opt.zero_grad()
            found = []
            for batch in window:
                loss = model(**batch).loss
                (loss / len(window)).backward()
                found.append(loss.item())
            runs.append(mean(found))
            return value(runs[-1], loss)

        opt.step(run)
        losses.append(runs[0])
    return opt, losses


@loop
def closure_that_accumulates_and_returns_the_mean(policy):
    return closure_over_windows(policy, torch.optim.AdamW, lambda total, last: total)


@loop
def closure_that_accumulates_and_returns_the_last(policy):
    # a window of one batch returns its own loss
    return closure_over_windows(policy, torch.optim.AdamW, lambda total, last: last)


@loop
def closure_that_returns_nothing(policy):
    return closure_over_windows(policy, torch.optim.AdamW, lambda total, last: None)


@loop
def lbfgs_that_accumulates(policy):
    return closure_over_windows(policy, torch.optim.LBFGS, lambda total, last: last, max_iter=3, lr=0.05)


def scaled(policy, zero, told=False):
    """A loss scaler that skips the third and the fifth window."""
    model, opt = chained(policy)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = []
    for i, window in enumerate(windows(14)):
        found = []
        for batch in window:
            loss = model(**batch).loss
            found.append(loss.item())
            scaler.scale(loss / len(window)).backward()
            if told:
                opt.observe(loss)
        if i in (2, 4):
            opt.live.adapters()[0].grad.fill_(float("inf"))
        else:
            losses.append(mean(found))
        scaler.step(opt)
        scaler.update()
        zero(opt)
    return opt, losses


@loop
def loss_scaling_with_skipped_steps(policy):
    return scaled(policy, lambda opt: opt.zero_grad())


@loop
def loss_scaling_with_the_models_own_zero_grad(policy):
    return scaled(policy, lambda opt: opt.model.zero_grad())


@loop
def loss_scaling_with_told_losses(policy):
    return scaled(policy, lambda opt: opt.zero_grad(), told=True)


def checkpointed(policy, reentrant):
    model, opt = chained(policy)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    losses = []
    for window in windows(8):
        found = []
        for batch in window:
            loss = model(**batch).loss
            loss.backward()
            found.append(loss)
        opt.step()
        opt.zero_grad()
        losses.append(mean(found))
    return opt, losses


@loop
def gradient_checkpointing(policy):
    return checkpointed(policy, reentrant=False)


@loop
def reentrant_gradient_checkpointing(policy):
    return checkpointed(policy, reentrant=True)


@loop
def the_whole_model_checkpointed(policy):
    model, opt = chained(policy)
    losses = []
    for window in windows(8):
        found = []
        for batch in window:
            call = lambda ids, labels: model(input_ids=ids, labels=labels).loss  # noqa: E731
            loss = torch.utils.checkpoint.checkpoint(call, *batch.values(), use_reentrant=False)
            loss.backward()
            found.append(loss)
        opt.step()
        opt.zero_grad()
        losses.append(mean(found))
    return opt, losses


def compiled_loop(policy, **kwargs):
    torch._dynamo.reset()
    model, opt = chained(policy)
    compiled = torch.compile(model, backend="eager")
    losses = []
    for window in windows(7):
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
        kwargs = {"num_items_in_batch": items} if "num_items_in_batch" in kwargs else {}
        found = []
        for batch in window:
            loss = compiled(**batch, **kwargs).loss
            loss.backward()
            found.append(loss)
        opt.step()
        opt.zero_grad()
        losses.append(mean(found) * (len(found) if kwargs else 1))
    torch._dynamo.reset()
    return opt, losses


@loop
def compiled(policy):
    return compiled_loop(policy)


@loop
def compiled_by_tokens(policy):
    return compiled_loop(policy, num_items_in_batch=None)


@loop
def bfloat16(policy):
    model, opt = chained(policy, tiny_opt().bfloat16())
    losses = []
    for window in windows(8):
        found = []
        for batch in window:
            loss = model(**batch).loss
            loss.backward()
            found.append(loss)
        opt.step()
        opt.zero_grad()
        losses.append(mean(found))
    return opt, losses


def sees_the_losses(name, policy):
    shown = policy()
    opt, losses = LOOPS[name](shown)
    assert len(losses) > 3
    if isinstance(shown, Sees):
        assert shown.losses == pytest.approx(losses, rel=1e-6)  # sums of a few fp32 numbers
    knots = knots_of(policy(), losses)
    assert [link.step for link in opt.chain] == knots
    assert [link.report.loss for link in opt.chain] == pytest.approx([losses[step - 1] for step in knots], rel=1e-6)
    return knots


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", LOOPS)
def test_the_policy_sees_the_loss_that_is_optimised(name, policy):
    assert sees_the_losses(name, POLICIES[policy])
