"""torch.compile: a knot adds no graph, neither at fixed rank nor when the rank steps down inside the mask."""

import subprocess
import sys

import pytest
import torch

from cola import ChainOptimizer, LinkConfig, StepKnots
from tests.models import BODY, Net, batch, loss_of, train


class Counted:
    """A backend that runs graphs as they are and counts how many it was given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def reset():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(compiled, opt, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        opt.zero_grad()
        x, y = batch(step)
        loss = (compiled(x) - y).square().mean()
        loss.backward()
        opt.observe(loss)
        opt.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("given", ["inner", "compiled", "in place"])
@pytest.mark.parametrize(
    "link", [{"r": 2}, {"r": (4, 2, 1), "rank_change": "mask"}], ids=["fixed rank", "masked step-down"]
)
def test_knots_add_no_graphs_and_train_as_without_compile(given, link):
    model, backend, plain = Net(), Counted(), Net()
    link = LinkConfig(lora_alpha=2, target_modules=BODY, **link)
    compiled = model if given == "in place" else torch.compile(model, backend=backend)
    if given == "in place":
        model.compile(backend=backend)
    opt, other = (
        ChainOptimizer(torch.optim.AdamW, m, StepKnots(every=2), link=link, lr=0.02)
        for m in (compiled if given == "compiled" else model, plain)
    )
    losses = run(compiled, opt, 2)
    graphs = backend.graphs
    assert graphs > 0
    losses += run(compiled, opt, 6, start=2)
    assert len(opt.chain) == 4
    assert backend.graphs == graphs
    # the traced graph may add the link's terms in another order
    assert losses == pytest.approx(train(other, plain, 8), abs=1e-6)


def test_finish_gives_back_a_model_that_compiles_as_plain():
    model, backend = Net(), Counted()
    compiled = torch.compile(model, backend=backend)
    opt = ChainOptimizer(
        torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(r=2, target_modules=BODY), lr=0.02
    )
    run(compiled, opt, 3)
    opt.finish()
    x, y = batch(0)
    assert (compiled(x) - y).square().mean().item() == pytest.approx(loss_of(model, 0).item(), abs=1e-6)


def test_importing_cola_does_not_import_the_compiler():
    code = (
        "import sys, torch; had = set(sys.modules); import cola; assert 'torch._dynamo' not in set(sys.modules) - had"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
