"""Every loop shows a policy, and records, the mean loss that each optimizer step has optimised."""

import tempfile
import warnings

import pytest
import torch

from cola import ChainOptimizer, KnotPolicy, LinkConfig, PlateauKnots, Signal
from tests.models import Net, tiny_opt
from tests.models import batch as rows

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


def trained(policy, cls=None, n=14, data=None, model=None, **changes):
    """A Trainer's run; it logs the loss of each step, and the wanted ones are those it logs."""
    from cola.integrations.transformers import attach

    arguments = {
        "num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 0.02, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "lr_scheduler_type": "constant",
        **{name: value for name, value in changes.items() if name not in ("compute_loss_func",)},
    }  # fmt: skip
    extra = {name: value for name, value in changes.items() if name in ("compute_loss_func",)}
    data = data or [{name: value[0] for name, value in batch.items()} for batch in batches(n, size=1)]
    with tempfile.TemporaryDirectory() as out:
        args = transformers.TrainingArguments(out, **arguments)
        trainer = (cls or transformers.Trainer)(model or tiny_opt(), args, train_dataset=data, **extra)
        opt = attach(trainer, torch.optim.AdamW, policy, link=LINK, finish=False)
        trainer.train()
    return opt, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class MeanOfTokens(transformers.Trainer):
    """Computes the wanted loss from the logits of a window, whatever the Trainer says."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**inputs).logits
        losses = cross_entropy(logits, inputs["labels"], reduction="sum")
        return losses / num_items_in_batch


class OwnMean(transformers.Trainer):
    """A mean of its own, which the Trainer is to divide."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.loss_is_scaled_for_ga = False
        output = model(**inputs)
        loss = 2 * output.loss + 0.01 * output.logits.square().mean()
        return (loss, output) if return_outputs else loss


def cross_entropy(logits, labels, **kwargs):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **kwargs)


def smoothed(output, labels, num_items_in_batch=None):
    return cross_entropy(output.logits, labels, reduction="sum", label_smoothing=0.1) / num_items_in_batch


@loop
def trainer(policy):
    return trained(policy)


@loop
def trainer_that_accumulates(policy):  # 7 batches an epoch: the last window is short
    return trained(policy, gradient_accumulation_steps=2)


@loop
def trainer_that_accumulates_three(policy):
    return trained(policy, gradient_accumulation_steps=3)


@loop
def trainer_with_compute_loss(policy):
    return trained(policy, MeanOfTokens, gradient_accumulation_steps=2)


@loop
def trainer_with_a_mean_of_its_own(policy):
    return trained(policy, OwnMean, gradient_accumulation_steps=2)


@loop
def trainer_with_compute_loss_func(policy):
    return trained(policy, compute_loss_func=smoothed, gradient_accumulation_steps=2)


@loop
def trainer_with_label_smoothing(policy):
    return trained(policy, label_smoothing_factor=0.1, gradient_accumulation_steps=3)


@loop
def trainer_with_gradient_checkpointing(policy):
    return trained(policy, activation_checkpointing=True, gradient_accumulation_steps=2)


@loop
def trainer_without_attach(policy):
    """The ChainOptimizer as any other optimizer: the model's own loss is seen."""
    model, opt = chained(policy)
    data = [{name: value[0] for name, value in batch.items()} for batch in batches(14, size=1)]
    with tempfile.TemporaryDirectory() as out:
        args = transformers.TrainingArguments(
            out, num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1, lr_scheduler_type="constant",
        )  # fmt: skip
        run = transformers.Trainer(model, args, train_dataset=data, optimizers=(opt, None))
        run.train()
    assert not opt.finished
    return opt, [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def lit(policy, automatic=True, divide=None, outputs=False, of=2, **changes):
    """A Lightning run over 7 batches; the loss is not the model's own unless ``outputs``."""
    lightning = pytest.importorskip("lightning")
    from cola.integrations.lightning import ChainKnots

    found = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = automatic
            self.net = tiny_opt() if outputs else Net()
            self.opt = ChainOptimizer(
                torch.optim.AdamW, self.net, policy, lr=0.02,
                link=LINK if outputs else LinkConfig(r=2, lora_alpha=2, target_modules=["first", "second"]),
            )  # fmt: skip

        def configure_optimizers(self):
            return self.opt

        def training_step(self, batch, index):
            loss = self.net(**batch).loss if outputs else (self.net(batch[0]) - batch[1]).square().mean()
            found.append(loss.item())
            if automatic:
                return loss
            self.manual_backward(loss / divide if divide else loss)
            if (index + 1) % of == 0 or index == 6:
                self.optimizers().step()
                self.optimizers().zero_grad()
            return None

    data = list(batches(7)) if outputs else [rows(i) for i in range(7)]
    module = Module()
    with tempfile.TemporaryDirectory() as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.Trainer(
            max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, default_root_dir=out,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[ChainKnots(finish=False)],
            **changes,
        ).fit(module, torch.utils.data.DataLoader(data, batch_size=None))  # fmt: skip
    epochs = [found[:7], found[7:]]
    return module.opt, [mean(epoch[i : i + of]) for epoch in epochs for i in range(0, 7, of)]


@loop
def lightning(policy):
    return lit(policy, of=1)


@loop
def lightning_that_accumulates(policy):
    return lit(policy, accumulate_grad_batches=2)


@loop
def lightning_that_accumulates_three_with_outputs(policy):
    return lit(policy, of=3, outputs=True, accumulate_grad_batches=3, gradient_clip_val=0.5)


@loop
def lightning_by_hand(policy):
    return lit(policy, automatic=False, of=1)


@loop
def lightning_by_hand_that_accumulates(policy):
    return lit(policy, automatic=False)


@loop
def lightning_by_hand_that_accumulates_and_divides(policy):
    return lit(policy, automatic=False, divide=2)


@loop
def lightning_by_hand_with_outputs(policy):
    return lit(policy, automatic=False, divide=2, outputs=True)


def fresh_state(accelerate):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def accelerated(policy, told):
    accelerate = pytest.importorskip("accelerate")
    fresh_state(accelerate)  # a Trainer before has left its own
    model = Net() if told else tiny_opt()
    link = LinkConfig(r=2, lora_alpha=2, target_modules=["first", "second"]) if told else LINK
    opt = ChainOptimizer(torch.optim.AdamW, model, policy, link=link, lr=0.02)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, wrapped = accelerator.prepare(model, opt)
    found = []
    for i, batch in enumerate(batches(12)):
        with accelerator.accumulate(model):
            x, y = rows(i)
            loss = (model(x) - y).square().mean() if told else model(**batch).loss
            found.append(loss.item())
            accelerator.backward(loss)
            if told:
                opt.observe(loss)
            wrapped.step()
            wrapped.zero_grad()
    fresh_state(accelerate)
    return opt, [mean(found[i : i + 2]) for i in range(0, 12, 2)]


@loop
def accelerate(policy):
    return accelerated(policy, told=False)


@loop
def accelerate_told(policy):
    return accelerated(policy, told=True)


@loop
def fabric(policy):
    lightning = pytest.importorskip("lightning")
    model, opt = chained(policy)
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model, wrapped = fabric.setup(model, opt)
    losses = []
    for window in windows(9):
        found = []
        for i, batch in enumerate(window):
            with fabric.no_backward_sync(model, enabled=i + 1 < len(window)):
                loss = model(**batch).loss
                found.append(loss.item())
                fabric.backward(loss / 2)
        wrapped.step()
        wrapped.zero_grad()
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


SLOW = ("compiled", "trainer", "lightning")
# slow loops meet the recording policy in every run of the tests, and the others in the long one
CROSSED = [
    pytest.param(name, policy, marks=[pytest.mark.long] if policy != "recording" and name.startswith(SLOW) else [])
    for name in LOOPS
    for policy in POLICIES
]


@pytest.mark.parametrize(("name", "policy"), CROSSED)
def test_the_policy_sees_the_loss_that_is_optimised(name, policy):
    assert sees_the_losses(name, POLICIES[policy])


@pytest.mark.parametrize("backwards", [1, 2])
def test_a_loss_times_zero_is_zero_and_no_nan(backwards):
    model, opt = chained(policy := Sees())
    for batch in batches(backwards):
        (model(**batch).loss * 0).backward()
    opt.step()
    assert policy.losses == [0.0]
