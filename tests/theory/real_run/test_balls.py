"""The balls of a real run are those of the oracles, and the probe measures any of them, on any run."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola import ChainOptimizer, LinkConfig, StepKnots
from tests.theory.real_run.chains import CLOSE, MODELS, dense, mlp, mlp_batches, mlp_loss, so_far, train
from theory import llm_gap
from theory.oracles import CappedTraceBall, RankBall, SpectralBall
from theory.real_run.balls import Ball
from theory.real_run.probe import GapProbe
from theory.real_run.snapshots import Snapshots

pytestmark = pytest.mark.numerics

SHAPE = (6, 5)
TWINS = {
    Ball("rank", 1): lambda shape, radius: RankBall(radius, 1, shape),
    Ball("rank", 2): lambda shape, radius: RankBall(radius, 2, shape),
    Ball("capped", 2): lambda shape, radius: CappedTraceBall(radius, 2, shape),
    Ball("spectral"): lambda shape, radius: SpectralBall(radius, shape),
}
# an SVD errs by a few units in the last place; the upper end is raised by 64 units of float32
ROUNDING = 1e-5


@pytest.mark.parametrize("ball", TWINS, ids=str)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_support_gauge_diameter_and_vertex_are_the_oracles(ball, seed):
    rng, twin = np.random.default_rng(seed), TWINS[ball](SHAPE, 1.0)
    G, W = rng.standard_normal(SHAPE), rng.standard_normal(SHAPE)
    u, sigma, vt = np.linalg.svd(G, full_matrices=False)
    low, high = ball.support(sigma, 0.0, 5)
    assert low == pytest.approx(twin.support(G), rel=1e-12)
    assert low <= high <= low * (1 + ROUNDING)
    assert ball.gauge(np.linalg.svd(W, compute_uv=False)) == pytest.approx(twin.gauge(W), rel=1e-12)
    assert ball.diameter(5) == pytest.approx(twin.diameter)
    values = ball.vertex_values(torch.from_numpy(sigma)).numpy()
    assert np.sum(G * (u * values @ vt)) == pytest.approx(twin.support(G), rel=1e-12)
    # an interval from a part of the range: Q'G, and what is left over
    Q = np.linalg.qr(rng.standard_normal((6, 3)))[0]
    part = np.linalg.svd(Q.T @ G, compute_uv=False)
    low, high = ball.support(part, float(np.linalg.norm(G - Q @ Q.T @ G, 2)), 5)
    assert low <= twin.support(G) <= high


@pytest.mark.parametrize("ball", [Ball("capped", 2), Ball("spectral")], ids=str)
def test_the_decomposition_on_other_balls_against_dense(ball):
    _, plain, opt, probe = train("mlp", sketch=64, rank=ball.rank, ball=ball.name)
    result = probe.decompose()
    diameter2 = 0.0
    for t, link in enumerate(opt.chain):
        _, grads = dense(plain, opt.chain, t, mlp_batches(), mlp_loss)
        gap = 0.0
        for path, G in grads.items():
            twin = TWINS[ball](tuple(G.shape), result.delta[path])
            W, step = so_far(opt.chain, t, path), link.factors[path].delta()
            W = W.numpy() if t else np.zeros(G.shape)
            gap += twin.gap(G.numpy(), W)
            diameter2 += twin.diameter**2 / len(opt.chain)
            assert twin.gauge(W) <= 1 + 1e-9
            assert twin.gauge(W + step.numpy() / result.eta) <= 1 + 1e-9
        assert result.low[t] == pytest.approx(gap, rel=1e-4)
    assert result.diameter == pytest.approx(math.sqrt(diameter2))
    assert result.as_dict()["ball"] == ball.name
    assert result.identity_error() <= 1e-12 * max(1.0, float(result.low.mean()))


@pytest.mark.parametrize("ball", [Ball("capped", 2), Ball("spectral")], ids=str)
def test_a_narrow_sketch_gives_an_interval_that_holds_the_gap(ball):
    _, _, _, exact = train("mlp", sketch=64, rank=ball.rank, ball=ball.name)
    _, _, _, narrow = train("mlp", sketch=4, rank=ball.rank, ball=ball.name)
    truth, found = exact.decompose(), narrow.decompose()
    assert np.all(found.low <= truth.low * (1 + CLOSE))
    assert np.all(truth.low <= found.high * (1 + CLOSE))


def test_fresh_batches_score_the_vertex_of_the_ball():
    """On the batches of the first pass again, the score is the support itself, for each ball."""
    _, _, opt, _ = train("mlp", probed=False)
    for ball in TWINS:
        given = {"rank": ball.rank, "ball": ball.name, "sketch": 64}
        fresh = GapProbe(mlp(), opt.chain, mlp_batches(), mlp_loss, fresh=mlp_batches(), **given).measure(0)
        fixed = GapProbe(mlp(), opt.chain, mlp_batches(), mlp_loss, **given).measure(0)
        for path, layer in fresh.layers.items():
            assert layer.scored == pytest.approx(fixed.layers[path].strength(ball)[0], rel=1e-3)


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_snapshots_of_a_chain_are_its_links(name):
    """Marked at every knot, snapshots give the chain's own decomposition."""
    build, batches, loss, targets = MODELS[name]
    model = build()
    link = LinkConfig(r=2, lora_alpha=4, target_modules=targets)
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=4), link=link, lr=2e-2)
    own = GapProbe(model, opt, batches(), loss, sketch=64)
    run = Snapshots(model, opt.live.layers)
    recorded = GapProbe(model, run, batches(), loss, sketch=64)
    opt.on_knot(lambda report: run.mark(report.step))
    data = batches(seed=2)
    for step in range(12):
        loss(model, data[step % len(data)]).backward()
        opt.step()
        opt.zero_grad()
    opt.finish()
    first, second = own.decompose(), recorded.decompose()
    assert len(second.low) == 3
    for what in ("low", "error_low", "loss", "distance2"):
        assert getattr(second, what) == pytest.approx(getattr(first, what), rel=1e-3), what


@pytest.mark.parametrize("ball", ["rank", "spectral"])
def test_a_run_without_a_chain_is_measured(ball):
    """Full fine-tuning by SGD, marked every four steps: losses and pairings are those of dense gradients."""
    model = mlp()
    plain = copy.deepcopy(model)
    run = Snapshots(model)
    probe = GapProbe(model, run, mlp_batches(), mlp_loss, sketch=64, ball=ball)
    optimizer = torch.optim.SGD([module.weight for module in run.layers.values()], lr=0.05)
    for step in range(8):
        mlp_loss(model, mlp_batches()[step % 4]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 4 == 3:
            run.mark(step + 1)
    result = probe.decompose()
    for t, link in enumerate(run.chain):
        value, grads = dense(plain, run.chain, t, mlp_batches(), mlp_loss)
        assert result.loss[t] == pytest.approx(value, rel=CLOSE)
        for path, G in grads.items():
            moved = float((G * link.factors[path].delta()).sum())
            assert probe.probes[t].layers[path].moved == pytest.approx(moved, rel=1e-3)
    assert result.loss[-1] < result.loss[0]
    assert np.all(result.low >= 0)
    assert result.identity_error() <= 1e-12 * max(1.0, float(result.low.mean()))


def test_a_link_that_starts_at_a_product_moves_the_difference():
    """With ``init="two-sided"`` the link is ``s (B A - B0 A0)``."""
    model = mlp()
    plain = copy.deepcopy(model)
    link = LinkConfig(r=2, lora_alpha=2, target_modules="all-linear", init="two-sided")
    opt = ChainOptimizer(torch.optim.SGD, model, StepKnots(every=2), link=link, lr=0.05)
    probe = GapProbe(model, opt, mlp_batches(), mlp_loss, sketch=64)
    for batch in mlp_batches():
        mlp_loss(model, batch).backward()
        opt.step()
        opt.zero_grad()
    opt.finish()
    result = probe.decompose()
    assert result.loss[0] == pytest.approx(dense(plain, opt.chain, 0, mlp_batches(), mlp_loss)[0], rel=1e-4)
    _, grads = dense(plain, opt.chain, 0, mlp_batches(), mlp_loss)
    for path, G in grads.items():
        moved = float((G * opt.chain[0].factors[path].delta()).sum())
        assert probe.probes[0].layers[path].moved == pytest.approx(moved, rel=1e-2)


def trained_on():
    model = mlp()
    run = Snapshots(model)
    run.mark()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    return GapProbe(model, run, mlp_batches(), mlp_loss)


@pytest.mark.parametrize("ball", ["capped", "spectral"])
def test_the_command_takes_a_ball(ball, tmp_path):
    options = ["--model", "random", "--epochs", "1", "--ball", ball, "--out", str(tmp_path)]
    assert llm_gap.main(options) == 0
    chain = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert chain["ball"] == ball


BAD = {
    "name": (lambda: Ball("cube"), "ball must be one of rank, capped, spectral, got 'cube'"),
    "rank": (lambda: Ball("rank", 0), "rank must be a whole number of at least 1, got 0"),
    "no layer": (lambda: Snapshots(torch.nn.Sequential()), "layers must name at least one layer, got none"),
    "unknown layer": (lambda: Snapshots(mlp(), ["5"]), "layers must have a weight with two axes, got '5'"),
    "unmarked": (lambda: trained_on().measure(0), r"trained on since its last mark: call its mark\(\) first"),
    "kept": (
        lambda: train("mlp", sketch=8)[3].decompose(ball="spectral"),
        "ball='spectral' needs all singular values: make GapProbe with ball='spectral'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_messages(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
