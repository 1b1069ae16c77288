"""A chain at the rate 1/L and its projected variant: the recursion is the library's, and planted errors are caught."""

import numpy as np
import pytest
import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, StepKnots
from theory.checks import FAIL, PASS
from theory.suite import restarts

pytestmark = pytest.mark.numerics

BETA = 4.0


def library(config, outputs=3, inputs=24, links=6):
    """The gradients ``G_k / beta`` of a real chain by SGD at the rate 1/beta, one step a link, and its directions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
    model = nn.Sequential(layer)
    target = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    opt = ChainOptimizer(torch.optim.SGD, model, StepKnots(every=1), link=config, lr=1 / BETA)
    x, seen = torch.eye(inputs, dtype=torch.float64), [layer.weight.detach() - target]
    for _ in range(links):
        loss = BETA / 2 * (model(x).T - target).square().sum()
        loss.backward()
        opt.step()
        opt.zero_grad()
        seen.append(layer.weight.detach() - target)
    opt.finish()
    return seen, [link.factors["0"].A.double() for link in opt.chain]


@pytest.mark.parametrize(
    "config, grows",
    [
        (LinkConfig(r=1, lora_alpha=1, target_modules=["0"], init="gaussian"), True),
        (LinkConfig(r=1, lora_alpha=1, target_modules=["0"], init="orthogonal", train="B"), False),
    ],
    ids=["chain", "projected"],
)
def test_the_recursion_is_the_librarys(config, grows):
    """G_{k+1} = G_k (I - a'a): the loss of the chain grows at every link, that of the projected one never does."""
    G, directions = library(config)
    for now, after, a in zip(G, G[1:], directions):
        assert torch.allclose(after, now - now @ a.T @ a, rtol=1e-6, atol=1e-6 * float(now.norm()))
        assert (float(after.norm()) > float(now.norm())) == grows
    assert (float(G[-1].norm()) > 100 * float(G[0].norm())) == grows


def test_the_checks_hold():
    plain, projected, grows, shrinks = restarts.restart_checks(0)
    assert {check.verdict for check in plain + projected} == {PASS}
    assert grows > 10 > 1 > shrinks
    assert max(check.level for check in plain) < 1e-8


def redrawn(length, repeated=False, runs=restarts.RUNS):
    """Chains whose directions have another length, or are drawn once."""
    rng, G = np.random.default_rng(0), np.zeros((runs, restarts.INPUTS))
    G[:, 0] = 1.0
    out, a = [np.ones(runs)], None
    for _ in range(restarts.LINKS):
        if a is None or not repeated:
            a = rng.standard_normal(G.shape)
            a *= length / np.linalg.norm(a, axis=1, keepdims=True)
        G = G - np.sum(G * a, axis=1, keepdims=True) * a
        out.append(np.sum(G * G, axis=1))
    return np.array(out).T


def test_planted_errors_are_caught():
    """The mended rate does not fail, directions that are too long raise the loss, and one direction is not enough."""
    assert FAIL in {check.verdict for check in restarts.fails(redrawn(1.0))}
    assert restarts.falls(redrawn(1.5)).verdict == FAIL
    assert restarts.projected_rate(redrawn(1.0)).verdict == PASS
    assert restarts.projected_rate(redrawn(1.0, repeated=True)).verdict == FAIL
    assert restarts.projected_rate(redrawn(0.5)).verdict == FAIL


def test_expected_growth():
    """Against the mean of 4000 draws, within five standard errors; where ``s^2 (r + n + 1) < 2`` the loss falls."""
    rng, n = np.random.default_rng(0), 12
    for rank, s in ((1, 1.0), (2, 0.5), (3, 0.2)):
        G, ratios = np.eye(n)[:1], []
        for _ in range(4000):
            A = s * rng.standard_normal((rank, n))
            ratios.append(float(np.sum((G - G @ A.T @ A) ** 2)))
        error = np.std(ratios) / np.sqrt(len(ratios))
        assert np.mean(ratios) == pytest.approx(restarts.expected_growth(n, rank, s), abs=5 * error)
    assert restarts.expected_growth(n, 3, 0.2) < 1 < restarts.expected_growth(n, 1)


def test_messages():
    with pytest.raises(ValueError, match="links must be a whole number of at least 1, got 0"):
        restarts.losses(True, links=0)
