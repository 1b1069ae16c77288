"""What the fast paths may cost, as counts: kernels, bytes, values read on the host. Times are the benchmark's."""

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from cola.knot.tie import residual_like, tie_
from tests.kernels import kernels
from tests.models import BODY, Net, loss_of

READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam])
def test_a_step_without_a_knot_computes_and_reads_what_the_bases_own_does(base):
    """So there is nothing for a device to wait for, whatever the base is."""
    model = Net()
    opt = ChainOptimizer(base, model, NeverKnots(), link=LinkConfig(r=2, target_modules=BODY), lr=0.01)
    for step in range(2):
        loss_of(model, step).backward()
        opt.step()  # the second step has its state
    assert kernels(opt.step) == kernels(opt.base.step)


def test_observing_a_loss_reads_nothing():
    model = Net()
    opt = ChainOptimizer(
        torch.optim.AdamW, model, StepKnots(every=100), link=LinkConfig(r=2, target_modules=BODY), lr=0.01
    )
    loss = loss_of(model, 0)
    loss.backward()
    opt.step()

    def observed():
        opt.observe(loss)
        opt.step()

    found, base = kernels(observed), kernels(opt.base.step)
    assert {name: found.get(name, 0) for name in READS} == {name: base.get(name, 0) for name in READS}


def test_a_layer_multiplies_eight_times_and_touches_nothing_else():
    """The frozen layer's two products, and the six of the link; sums ride along, as addmm."""
    model = nn.Sequential(nn.Linear(48, 64, dtype=torch.float32))
    ChainOptimizer(torch.optim.SGD, model, NeverKnots(), link=LinkConfig(r=4, target_modules="all-linear"), lr=0.1)
    x = torch.randn(100, 48, requires_grad=True)
    y = []
    forward = kernels(lambda: y.append(model(x)))
    assert forward == {"mm": 1, "addmm": 1, "addmm_": 1}
    backward = kernels(lambda: torch.autograd.grad(y[0], [x, *(p for p in model.parameters() if p.requires_grad)],
                                                   torch.ones_like(y[0])))  # fmt: skip
    del backward["ones_like"]
    # s rides along too; the clone turns an r×out matrix round
    assert backward == {"mm": 2, "addmm": 2, "addmm_": 1, "clone": 1}


@pytest.mark.parametrize(
    ("dtype", "rounding", "most"),
    [
        (torch.float32, "nearest", 7),
        (torch.bfloat16, "nearest", 7),
        (torch.bfloat16, "stochastic", 9),
        (torch.bfloat16, "compensated", 13),
    ],
    ids=str,
)
def test_passes_of_a_tie_over_its_block(dtype, rounding, most):
    """A block more costs so many kernels more; reading two or three sums is no pass."""

    def count(blocks):
        W = torch.ones(blocks * 64, 1024, dtype=dtype)
        L, R = torch.full((blocks * 64, 2), 1e-3), torch.ones(2, 1024)
        residual = residual_like(W) if rounding == "compensated" else None
        found = kernels(lambda: tie_(W, L, R, 1.0, rounding=rounding, residual=residual))
        return sum(n for name, n in found.items() if name not in READS)

    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a block per thread
    try:
        assert count(3) - count(2) <= most
    finally:
        torch.set_num_threads(torch_threads)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_a_tie_allocates_four_blocks_at_most(rounding):
    W = torch.ones(2048, 1024, dtype=torch.bfloat16)
    L, R = torch.full((2048, 8), 1e-3), torch.ones(8, 1024)
    residual = residual_like(W) if rounding == "compensated" else None
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            tie_(W, L, R, 1.0, rounding=rounding, residual=residual)
    finally:
        torch.set_num_threads(torch_threads)
    now = most = 0
    for event in sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
                        key=lambda e: e.start_ns()):  # fmt: skip
        now += event.nbytes()
        most = max(most, now)
    block = 4 << 16
    factors = 8 * (2048 + 1024) * (4 + 8 + 8)  # scaled in fp32, and in double for the norm of the update
    assert 3 * block <= most <= (4 if rounding == "stochastic" else 3) * block + factors + 4096 * 4
