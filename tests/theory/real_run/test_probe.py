"""The probe of a real run: every sketched number is compared with dense gradients and SVDs on small models."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cola import Chain, ChainOptimizer, LinkConfig, StepKnots
from tests.theory.real_run.chains import (
    CLOSE,
    MODELS,
    dense,
    lm_batches,
    lm_loss,
    mlp,
    mlp_batches,
    mlp_loss,
    so_far,
    train,
)
from theory.real_run.probe import GapProbe

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("sketch", [64, 4])
@pytest.mark.parametrize("name", MODELS)
def test_every_number_against_dense_gradients(name, sketch):
    """An exact range (64 columns) gives the dense values, and four columns an interval that contains them."""
    _, plain, opt, probe = train(name, sketch=sketch, rank=2)
    _, batches, loss, _ = MODELS[name]
    assert len(opt.chain) == 3
    for t, link in enumerate(opt.chain):
        value, grads = dense(plain, opt.chain, t, batches(), loss)
        assert probe.probes[t].loss == pytest.approx(value, rel=CLOSE)
        for path, G in grads.items():
            found = probe.probes[t].layers[path]
            size = float(G.norm())
            step, behind = link.factors[path].delta(), so_far(opt.chain, t, path)
            assert found.moved == pytest.approx(float((G * step).sum()), abs=CLOSE * size * float(step.norm()))
            pairing = float((G * behind).sum()) if t else 0.0
            assert found.pairing == pytest.approx(pairing, abs=CLOSE * size * max(1.0, float(behind.norm())))
            exact = torch.linalg.svdvals(G)
            for rank in (1, 2):
                low, high = found.strength(rank)
                truth = float(exact[:rank].norm())
                assert low <= truth * (1 + CLOSE)
                assert truth <= high * (1 + CLOSE)
                if sketch == 64:
                    assert low == pytest.approx(truth, rel=CLOSE)
                    assert high == pytest.approx(truth, rel=2 * CLOSE)


def test_moved_is_the_directional_derivative():
    """``<G, B_t A_t>`` agrees with differences of the loss along the link, with dense weights in float64."""
    _, plain, opt, probe = train("mlp", sketch=8)
    plain, batches = plain.double(), [tuple(x.double() for x in b) for b in mlp_batches()]
    h = 1e-5

    def at(scale):
        model = copy.deepcopy(plain).eval()
        with torch.no_grad():
            for path, factor in opt.chain[0].factors.items():
                model.get_submodule(path).weight += scale * factor.delta()
            return float(sum(mlp_loss(model, b) for b in batches)) / len(batches)

    moved = sum(layer.moved for layer in probe.probes[0].layers.values())
    assert (at(h) - at(-h)) / (2 * h) == pytest.approx(moved, rel=1e-4)


def test_the_run_does_not_notice_the_probe():
    """The weights are equal bit for bit, although dropout draws from the global generator."""
    with_probe, _, _, _ = train("mlp")
    without, _, _, _ = train("mlp", probed=False)
    for name, value in with_probe.state_dict().items():
        assert torch.equal(value, without.state_dict()[name]), name


def test_nothing_is_left_on_the_model():
    model = mlp()
    opt = ChainOptimizer(
        torch.optim.SGD, model, StepKnots(every=2), link=LinkConfig(r=1, target_modules="all-linear"), lr=0.1
    )
    probe = GapProbe(model, opt, mlp_batches(), mlp_loss)
    model.train()
    mlp_loss(model, mlp_batches()[0]).backward()
    opt.step()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    opt.tie()
    state = torch.get_rng_state()
    probe.measure(0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model if isinstance(module, nn.Linear))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora" not in name)
    for name, p in model.named_parameters():
        if "lora" not in name:
            assert (p.grad is None) == (grads[name] is None)


class LargestGradient(TorchDispatchMode):
    """Records the shapes of all tensors that operations create; views do not count."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        if isinstance(out, torch.Tensor) and not out._is_view() and function._schema.name != "aten::t":
            self.made.add((tuple(out.shape), function._schema.name))
        return out


def test_no_full_size_gradient_is_ever_formed():
    """Layers 37 x 23 and 11 x 37: no operation of a probe makes a tensor of either shape, or its transpose."""
    _, _, opt, _ = train("mlp")
    model = mlp()
    probe = GapProbe(model, opt.chain, mlp_batches(), mlp_loss, sketch=4)
    with LargestGradient() as watch:
        probe.measure(1)
    shapes = {shape for shape, _ in watch.made}
    assert (16, 37) in shapes  # the watch sees the forward pass
    assert not shapes & {(37, 23), (23, 37), (11, 37), (37, 11)}


def test_a_probe_costs_two_passes():
    """Two forward and backward passes over the batches per link, and one forward pass for the last loss."""
    calls = []

    def counting(model, batch):
        calls.append(torch.is_grad_enabled())
        return mlp_loss(model, batch)

    _, _, opt, _ = train("mlp")
    probe = GapProbe(mlp(), opt.chain, mlp_batches(), counting)
    probe.measure(0)
    assert calls == [True] * 2 * len(mlp_batches())
    calls.clear()
    probe.loss_now()
    assert calls == [False] * len(mlp_batches())


def test_a_finished_chain_can_be_measured_afterwards():
    model, _, opt, online = train("opt", sketch=8)
    later = GapProbe(model, opt.chain, lm_batches(), lm_loss, sketch=8)
    for t in range(3):
        later.measure(t)
        for path, layer in later.probes[t].layers.items():
            assert layer.sigma == pytest.approx(online.probes[t].layers[path].sigma, rel=1e-3)
            assert layer.moved == pytest.approx(online.probes[t].layers[path].moved, rel=1e-3, abs=1e-6)
    assert later.decompose().low == pytest.approx(online.decompose().low, rel=1e-3)


def test_fresh_batches_score_the_first_pass_vertex():
    """``scored`` is ``<G_B, u v'>`` with unit u, v from batches A, and at most the top singular value of G_B.

    It has no upward bias: on pure noise, whose true gradient is zero, scores lie around zero and the reported
    values far above.
    """
    _, plain, opt, _ = train("mlp", probed=False)
    scores, reported = [], []
    for seed in range(30):
        noise = [
            (torch.randn(16, 23, generator=g), torch.randn(16, 11, generator=g) * 10)
            for g in [torch.Generator().manual_seed(100 + seed)]
            for _ in range(4)
        ]
        # a linear loss in the output has the gradient of pure noise
        probe = GapProbe(
            copy.deepcopy(plain), opt.chain, noise[:2], lambda m, b: (m(b[0]) * b[1]).mean(), fresh=noise[2:], sketch=40
        )
        layer = probe.measure(0).layers["3"]
        scores.append(layer.scored)
        reported.append(layer.sigma[0])
        _, grads = dense(plain, opt.chain, 0, noise[2:], lambda m, b: (m(b[0]) * b[1]).mean())
        assert abs(layer.scored) <= float(torch.linalg.svdvals(grads["3"])[0]) * (1 + CLOSE)
    mean, error = np.mean(scores), np.std(scores) / math.sqrt(len(scores))
    assert abs(mean) <= 4 * error
    assert np.mean(reported) > 10 * error


def test_residual_bound_holds_on_a_flat_spectrum():
    """If a sketch of 8 columns misses most of the gradient, the interval is wide but contains sigma_1."""
    x = torch.eye(40)
    model = nn.Sequential(nn.Linear(40, 40, bias=False))
    link = LinkConfig(r=1, target_modules="all-linear")
    opt = ChainOptimizer(torch.optim.SGD, model, StepKnots(every=1), link=link, lr=0.1)
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]

    def loss(m, batch):
        return (m(batch) * Q).sum()  # gradient Q': all singular values are one

    loss(model, x).backward()
    opt.step()
    for seed in range(20):
        low, high = GapProbe(model, opt, [x], loss, sketch=8, seed=seed).measure(0).layers["0"].strength(1)
        assert low <= 1 + CLOSE
        assert high >= 1
        # for 40 equal singular values the bound is about the Frobenius norm, 6.3, times the safety factor 1.9
        assert high < 15


def test_half_precision_runs_and_stays_near_float32():
    """bf16 gradients are off by about half a percent; the offset is added in float32."""
    _, plain, opt, _ = train("mlp", sketch=40)
    half = copy.deepcopy(plain).bfloat16()
    batches = [tuple(x.bfloat16() for x in b) for b in mlp_batches()]
    # the untouched copy lacks the links, but W_0 minus all links is a fixed point too
    low = GapProbe(half, opt.chain, batches, mlp_loss, sketch=40).measure(2)
    full = GapProbe(copy.deepcopy(plain), opt.chain, mlp_batches(), mlp_loss, sketch=40).measure(2)
    for path, layer in low.layers.items():
        assert layer.sigma[0] == pytest.approx(full.layers[path].sigma[0], rel=0.05)


def test_a_loss_that_draws_sees_the_same_draws_in_every_pass_and_leaves_the_generator():
    drawn = []

    def loss(model, batch):
        drawn.append(torch.rand(3))
        return mlp_loss(model, batch)

    model, _, opt, _ = train("mlp", probed=False)
    before = torch.get_rng_state()
    probe = GapProbe(model, opt.chain, mlp_batches(), loss)
    probe.measure(0)
    probe.loss_now()
    assert torch.equal(before, torch.get_rng_state())
    passes = torch.stack(drawn).reshape(3, 4, 3)
    assert torch.equal(passes[0], passes[1])
    assert torch.equal(passes[0], passes[2])


BAD = {
    "opt": (lambda m, o: GapProbe(m, torch.optim.SGD(m.parameters(), 0.1), [1]), TypeError, "must be a ChainOptimizer"),
    "batches": (lambda m, o: GapProbe(m, o, []), ValueError, "batches must hold at least one"),
    "keep": (lambda m, o: GapProbe(m, Chain(keep=False), [1]), ValueError, "keep_links=True"),
    "sketch": (lambda m, o: GapProbe(m, o, [1], sketch=0), ValueError, "sketch must be a whole number .* got 0"),
    "link": (lambda m, o: probe_of(m, o).measure(7), ValueError, "link must be one of the chain's 3 links, got 7"),
    "unmeasured": (lambda m, o: probe_of(m, o).decompose(), ValueError, r"missing \[0, 1, 2\]: call measure"),
    "delta": (
        lambda m, o: measured(m, o).decompose(delta=1e-3),
        ValueError,
        "delta must be at least .* got 0.001: a smaller set leaves",
    ),
    "eta": (lambda m, o: measured(m, o).decompose(eta=0.0), ValueError, "eta .* got 0.0"),
    "rank": (lambda m, o: measured(m, o).decompose(rank=3), ValueError, "at most the probe's 1, got 3"),
    "loss": (
        lambda m, o: GapProbe(m, o, mlp_batches(), lambda m, b: m(b[0])).measure(0),
        ValueError,
        "loss must return a finite scalar",
    ),
    "unrelated loss": (
        lambda m, o: GapProbe(m, o, [1], lambda m, b: torch.ones((), requires_grad=True)).measure(0),
        ValueError,
        "loss must run the layers .* it called none",
    ),
}


def probe_of(model, opt):
    return GapProbe(model, opt.chain, mlp_batches(), mlp_loss)


def measured(model, opt):
    probe = probe_of(model, opt)
    for t in range(3):
        probe.measure(t)
    return probe


@pytest.mark.parametrize("name", BAD)
def test_message(name):
    model, _, opt, _ = train("mlp", probed=False)
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call(model, opt)
