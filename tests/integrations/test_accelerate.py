"""Accelerate with a chain: prepare(), mixed precision, accumulation, save_state and load_state."""

import pytest
import torch

from cola import ChainOptimizer, LinkConfig, PlateauKnots, StepKnots
from tests.models import BODY, Net, batch, loss_of, train

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate keeps its state in globals; a Trainer in another test may have left some."""
    forget()
    yield
    forget()


def forget():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(accelerator, model=None, policy=None, r=2, **kwargs):
    model = model or Net()
    link = LinkConfig(r=r, lora_alpha=2, target_modules=BODY)
    opt = ChainOptimizer(torch.optim.AdamW, model, policy or StepKnots(every=3), link=link, lr=0.02, **kwargs)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 4)
    return (opt, *accelerator.prepare(model, opt, scheduler))


def run(accelerator, opt, model, wrapped, scheduler, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        with accelerator.accumulate(model):
            x, y = batch(step)
            loss = (model(x) - y).square().mean()
            accelerator.backward(loss)
            opt.observe(loss)
            wrapped.step()
            scheduler.step()
            wrapped.zero_grad()
        losses.append(loss.item())
    return losses


def test_prepared_training_is_plain_training():
    accelerator = accelerate.Accelerator(cpu=True)
    opt, model, wrapped, _ = prepared(accelerator)
    losses = []
    for step in range(8):
        wrapped.zero_grad()
        loss = loss_of(model, step)
        accelerator.backward(loss)
        wrapped.step()
        losses.append(loss.item())
    plain = Net()
    link = LinkConfig(r=2, lora_alpha=2, target_modules=BODY)
    assert losses == train(ChainOptimizer(torch.optim.AdamW, plain, StepKnots(every=3), link=link, lr=0.02), plain, 8)
    assert len(opt.chain) == 2


def test_accumulation_counts_optimizer_steps():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    opt, model, wrapped, scheduler = prepared(accelerator, policy=StepKnots(every=2))
    run(accelerator, opt, model, wrapped, scheduler, 8)
    assert opt.steps == 4
    assert [link.step for link in opt.chain] == [2, 4]


def test_bf16_mixed_precision_keeps_fp32_factors_and_a_continuous_loss():
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    opt, model, wrapped, scheduler = prepared(accelerator)
    run(accelerator, opt, model, wrapped, scheduler, 2)
    before = loss_of(model, 0).item()
    report = opt.tie()
    assert opt.chain[0].factors["first"].A.dtype == torch.float32
    # three layers in bf16 (eps 2⁻⁸) on either side of the knot
    assert loss_of(model, 0).item() == pytest.approx(before, rel=6 * 2**-8)
    assert report.lost_norm < 1e-6 * report.delta_norm


@pytest.mark.parametrize("r", [2, (2, 1)], ids=str)
@pytest.mark.parametrize("steps", [3, 4, 7])
def test_save_state_and_load_state_go_on_bit_for_bit(tmp_path, r, steps):
    accelerator = accelerate.Accelerator(cpu=True)
    policy = lambda: StepKnots(every=3) | PlateauKnots(window=2)  # noqa: E731
    first = prepared(accelerator, policy=policy(), r=r)
    run(accelerator, *first, steps)
    accelerator.save_state(str(tmp_path))
    wanted = run(accelerator, *first, 6, start=steps)
    fresh_start = accelerate.Accelerator(cpu=True)
    fresh_start._models.clear(), fresh_start._optimizers.clear(), fresh_start._schedulers.clear()
    second = prepared(fresh_start, policy=policy(), r=r)
    fresh_start.load_state(str(tmp_path))
    assert run(fresh_start, *second, 6, start=steps) == wanted
    assert [link.step for link in second[0].chain] == [link.step for link in first[0].chain]


@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_scaler_under_accelerate_skips_steps_that_then_do_not_count(fused):
    """Accelerate scales on accelerators alone; its optimizer, which patches ``step`` to see skips, runs anywhere."""
    accelerate.Accelerator(cpu=True)
    model = Net()
    link = LinkConfig(r=2, lora_alpha=2, target_modules=BODY)
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=link, lr=0.02, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(opt, scaler=scaler)
    skipped = []
    for step in range(5):
        wrapped.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 1:
            model.first.lora_B.grad.fill_(float("inf"))
        wrapped.step()
        skipped.append(wrapped.step_was_skipped)
    assert skipped == [False, True, False, False, False]
    assert opt.steps == 4
    assert [link.step for link in opt.chain] == [2, 4]


def test_step_hooks_and_attributes_are_those_of_the_optimizer_within():
    """Accelerate's wrapper hands on neither: they are set on, and read from, the ChainOptimizer itself."""
    accelerator = accelerate.Accelerator(cpu=True)
    opt, model, wrapped, scheduler = prepared(accelerator)
    calls = []
    opt.register_step_post_hook(lambda o, a, k: calls.append(o.steps))
    run(accelerator, opt, model, wrapped, scheduler, 4)
    assert calls == [1, 2, 3, 4]
    assert not hasattr(wrapped, "chain")
    assert wrapped.optimizer is opt
    assert len(opt.param_groups) == 1
