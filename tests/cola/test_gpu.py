"""A chain on a GPU: other kernels, another generator, a queue that no step may wait for. `make gpu` runs these there.

Without a GPU they run on the CPU, where they can; so they do not fail there for another reason.
"""

import copy

import pytest
import torch
from torch import nn

from cola import Chain, ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from cola.knot.tie import residual_like, tie_
from cola.lora.layer import kept, share_kept
from tests.cola.checkpoint.resumed import made, same, wrap
from tests.models import BODY, Net, batch, draw

HAS_GPU = torch.cuda.is_available()
NO_GPU = "needs a GPU that torch can use"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize(
        "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason=NO_GPU))]
    ),
]
ROUNDINGS = ["nearest", "stochastic", "compensated"]


def steps(opt, model, count, start=0):
    """A plain loop on the model's device."""
    losses = []
    for step in range(start, start + count):
        opt.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        opt.observe(loss)
        opt.step()
        losses.append(loss.item())
    return losses


def loss_of(model, step):
    weight = model.head.weight
    x, y = (values.to(weight.device) for values in batch(step, dtype=weight.dtype))
    return (model(x) - y).square().mean()


def chained(model, policy=None, **changes):
    link = LinkConfig(r=2, target_modules=BODY)
    return ChainOptimizer(torch.optim.AdamW, model, policy or StepKnots(every=2), link=link, lr=0.02, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_layer_and_its_gradients_are_those_of_float64(device, dtype):
    tokens, inner, out, r = 64, 96, 80, 8
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(inner, out)).to(device, dtype)
    link = LinkConfig(r=r, lora_alpha=16, target_modules="all-linear")
    ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=link, lr=0.0)
    layer = model[0]
    with torch.no_grad():
        layer.weight.copy_(torch.randn(out, inner, generator=g) / inner**0.5)
        layer.lora_A.copy_(torch.randn(r, inner, generator=g) / r)
        layer.lora_B.copy_(torch.randn(out, r, generator=g) * 0.1)
    x, upstream = torch.randn(tokens, inner, generator=g).to(dtype), torch.randn(tokens, out, generator=g).to(dtype)
    moved = x.to(device, copy=True).requires_grad_()
    found = model(moved)
    found.backward(upstream.to(device))

    W, b, A, B = (p.detach().double().cpu() for p in (layer.weight, layer.bias, layer.lora_A, layer.lora_B))
    leaves = [t.requires_grad_() for t in (x.double(), A, B)]
    exact = leaves[0] @ (W + layer.scaling * leaves[2] @ leaves[1]).T + b
    exact.backward(upstream.double())
    pairs = [(found.detach(), exact.detach()), (moved.grad, leaves[0].grad)]
    pairs += [(layer.lora_A.grad, leaves[1].grad), (layer.lora_B.grad, leaves[2].grad)]
    # sums of at most 96 terms in fp32, rounded to the dtype three times or fewer; errors of random sign add as roots
    for value, twin in pairs:
        assert (value.double().cpu() - twin).norm() <= 8 * torch.finfo(dtype).eps * twin.norm()


@pytest.mark.parametrize("residual_device", ["cpu", "weight's"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_tie_is_the_float64_sum_within_one_rounding(device, dtype, rounding, residual_device):
    m, n, r = 700, 300, 4  # several blocks on a GPU
    g = torch.Generator().manual_seed(1)
    W = torch.randn(m, n, generator=g).to(dtype)
    L, R = torch.randn(m, r, generator=g) * 1e-3, torch.randn(r, n, generator=g)
    new = W.to(device, copy=True)
    residual = None
    if rounding == "compensated":
        residual = residual_like(W, "cpu" if residual_device == "cpu" else device)
    tie = tie_(new, L.to(device), R.to(device), 2.0, rounding=rounding, seed=3, residual=residual)
    exact = W.double() + 2.0 * L.double() @ R.double()
    error = new.double().cpu() - exact
    # half a unit in the last place (a whole one if stochastic), and the rounding of the products and of the sum
    products = 2.0 * L.double().abs() @ R.double().abs()
    slack = torch.finfo(torch.float32).eps * ((r + 2) * products + 2 * exact.abs())
    unit = torch.finfo(dtype).eps * (1.0 if rounding == "stochastic" else 0.5)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (error.abs() <= unit * exact.abs() + slack + smallest).all()
    assert abs(tie.deviation - error.norm().item()) <= slack.norm().item()
    assert tie.delta == pytest.approx((exact - W.double()).norm().item(), rel=1e-5)  # L and R in fp32
    if residual is not None:
        left = (exact - new.double().cpu() - residual.double().cpu()).norm().item()
        assert left <= max(2.0**-8 * error.norm().item(), 0.0) + slack.norm().item()  # the residual is bf16 or fp32
    again = W.to(device, copy=True)
    kept_back = None if residual is None else torch.zeros_like(residual)
    tie_(again, L.to(device), R.to(device), 2.0, rounding=rounding, seed=3, residual=kept_back)
    assert torch.equal(again, new)


def test_a_dropout_mask_has_its_share_and_comes_back_from_its_seed(device):
    like = torch.empty(512, 301, device=device, dtype=torch.bfloat16)
    mask = kept(like, 0.3, seed=5)
    assert torch.equal(mask, kept(like, 0.3, seed=5))
    assert set(mask.unique().tolist()) == {-1, 0}
    share, p = -mask.float().mean().item(), share_kept(0.3)
    assert abs(share - p) <= 5 * (p * (1 - p) / like.numel()) ** 0.5


def test_a_link_starts_from_the_cpus_draws(device):
    model = Net().to(device)
    opt = chained(model, seed=7)
    for link in range(3):
        for path, layer in opt.live.layers.items():
            A, _ = draw(LinkConfig(r=2, target_modules=BODY), (6, 6), seed=7, link=link, layer=path)
            assert torch.equal(layer.lora_A.cpu(), A)
        steps(opt, model, 2, start=2 * link)


def test_a_chain_in_float64_is_that_of_the_cpu(device):
    model, twin = Net(dtype=torch.float64).to(device), Net(dtype=torch.float64)
    opt, other = chained(model), chained(twin)
    losses = steps(opt, model, 7)
    # a million roundings of float64, of losses and weights near 1
    assert losses == pytest.approx(steps(other, twin, 7), abs=1e-10)
    opt.finish()
    other.finish()
    assert len(opt.chain) == len(other.chain) == 4
    for name, value in model.state_dict().items():
        assert (value.cpu() - twin.state_dict()[name]).abs().max() <= 1e-10


@pytest.mark.parametrize(
    "case", ["fp32", "bf16 nearest", "bf16 stochastic", "bf16 compensated", "masked ranks", "dropout"]
)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(device, case, tmp_path):
    model, resumed = made(case)[0].to(device), made(case)[0].to(device)
    opt = wrap(model, case)
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # for dropout
        torch.manual_seed(0)
        steps(opt, model, 6)
        opt.save(tmp_path / "run")
        states = copy.deepcopy((model.state_dict(), opt.state_dict()))
        random = torch.get_rng_state(), torch.cuda.get_rng_state() if devices else None
        losses = steps(opt, model, 5, start=6)
        opt.finish()
        for load in ("directory", "states"):
            resumed = made(case)[0].to(device)
            other = wrap(resumed, case)
            if load == "directory":
                other.load(tmp_path / "run")
            else:
                resumed.load_state_dict(states[0])
                other.load_state_dict(states[1])
            torch.set_rng_state(random[0])
            if devices:
                torch.cuda.set_rng_state(random[1])
            assert steps(other, resumed, 5, start=6) == losses
            other.finish()
            assert same(resumed.state_dict(), model.state_dict())


def test_its_chain_applies_on_the_cpu_and_is_undone(device, tmp_path):
    model = Net().to(device)
    opt = chained(model)
    steps(opt, model, 6)
    opt.finish()
    opt.chain.save(tmp_path / "chain")
    fresh = Chain.load(tmp_path / "chain").apply(Net())  # refuses a base with another digest
    for name, value in fresh.state_dict().items():
        # three ties, each a sum of two products in fp32 that another device takes in another order
        assert (value - model.state_dict()[name].cpu()).abs().max() <= 3 * 4 * torch.finfo(torch.float32).eps
    for _ in range(3):
        opt.chain.undo(model, Net().state_dict())
    assert same({name: value.cpu() for name, value in model.state_dict().items()}, Net().state_dict())


def test_a_scaled_run_in_half_precision_counts_the_steps_that_were_made(device):
    """A scale of 2⁴⁰ overflows in the first steps, which the scaler then skips: they are no steps of the chain."""
    model = Net().to(device)
    opt = chained(model, StepKnots(at=[2]))
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40, growth_interval=1000)
    half = torch.float16
    taken = 0
    for step in range(60):
        opt.zero_grad()
        with torch.autocast(device, dtype=half):
            loss = loss_of(model, step)
        scaler.scale(loss.float()).backward()
        before = scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        taken += scaler.get_scale() >= before
        assert len(opt.chain) == (taken >= 2)
        if taken == 4:
            break
    assert 0 < taken < step + 1


@pytest.mark.long
def test_quantised_layers_are_trained_tied_and_resumed(device, tmp_path):
    pytest.importorskip("bitsandbytes")
    from tests.integrations import quantized_nets as nets

    def run(opt, model, count, start=0):
        losses = []
        for step in range(start, start + count):
            opt.zero_grad()
            x = nets.inputs(step).to(device)
            loss = (model(x) - x[:, :3]).square().mean()
            loss.backward()
            opt.observe(loss)
            opt.step()
            losses.append(loss.item())
        return losses

    for how in ("stack", "requantize"):
        model, resumed = nets.net().to(device), nets.net().to(device)
        opt, other = nets.chained(model, quantized=how), nets.chained(resumed, quantized=how)
        run(opt, model, 4)
        opt.save(tmp_path / how)
        other.load(tmp_path / how)
        assert run(other, resumed, 3, start=4) == run(opt, model, 3, start=4)
        assert len(opt.chain) == 2


def test_memory_is_the_same_after_every_knot(device):
    if device == "cpu":
        pytest.skip("torch counts the memory of a GPU alone")
    model = Net(d=256).to(device)
    x = torch.randn(32, 256, device=device)
    opt = chained(model, NeverKnots())
    held = []
    for _ in range(6):
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        opt.tie()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert set(held[1:]) == {held[-1]}  # links are kept on the CPU


def test_a_step_without_a_knot_never_waits(device):
    model = Net().to(device)
    opt = chained(model, StepKnots(every=100))
    x, y = (values.to(device) for values in batch(0))
    for waits in ("default", "error"):
        if device == "cuda":
            torch.cuda.set_sync_debug_mode(waits)
        try:
            for _ in range(2):
                opt.zero_grad()
                loss = (model(x) - y).square().mean()
                loss.backward()
                opt.observe(loss)
                opt.step()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert not opt.chain


def test_a_captured_graph_sees_the_next_link(device):
    if device == "cpu":
        pytest.skip("a GPU alone records graphs")
    model = Net().to(device).eval()
    opt = chained(model, NeverKnots())
    steps(opt, model, 2)
    x = batch(9)[0].to(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        model(x)  # the libraries begin outside the recording
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        recorded = model(x)
    opt.tie()
    steps(opt, model, 2, start=2)
    graph.replay()
    with torch.no_grad():
        now = model(x)
    # the libraries may take another kernel while they are recorded, so terms are added in another order
    assert (recorded - now).abs().max() <= 32 * torch.finfo(torch.float32).eps
