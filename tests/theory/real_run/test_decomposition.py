"""The decomposition of a chain's average gap, recomputed with dense matrices on small models."""

import numpy as np
import pytest

from tests.theory.real_run.chains import CLOSE, MODELS, dense, lm_batches, so_far, train
from theory.oracles import RankBall


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_decomposition_against_dense(name, rank):
    """Gap, oracle error, alignment and c_t recomputed with dense matrices; K contains every W_t and V_t."""
    _, plain, opt, probe = train(name, sketch=64, rank=rank)
    _, batches, loss, _ = MODELS[name]
    result = probe.decompose()
    T, eta = len(opt.chain), result.eta
    assert eta == pytest.approx(1 / T)
    losses = [dense(plain, opt.chain, t, batches(), loss)[0] for t in range(T + 1)]
    assert result.loss == pytest.approx(losses, rel=CLOSE)
    for t, link in enumerate(opt.chain):
        _, grads = dense(plain, opt.chain, t, batches(), loss)
        gap, moved = 0.0, 0.0
        for path, G in grads.items():
            ball = RankBall(result.delta[path], rank, tuple(G.shape))
            W, step = so_far(opt.chain, t, path), link.factors[path].delta()
            W = W.numpy() if t else np.zeros(G.shape)
            gap += ball.gap(G.numpy(), W)
            moved += float((G * step).sum())
            assert ball.gauge(W) <= 1 + 1e-9
            assert ball.gauge(W + step.numpy() / eta) <= 1 + 1e-9
        assert result.low[t] == pytest.approx(gap, rel=1e-4)
        assert result.low[t] >= 0
        assert result.error_low[t] == pytest.approx(gap + moved / eta, rel=1e-4)
        assert result.alignment[t, 0] == pytest.approx(-moved / eta / gap, rel=1e-3, abs=1e-6)
        curvature = 2 * (losses[t + 1] - losses[t] - moved) / eta**2
        assert result.curvature[t] == pytest.approx(curvature, abs=1e-4 * max(losses) / eta**2)
    assert result.identity_error() <= 1e-12 * max(1.0, float(result.low.mean()))
    assert sum(result.terms.values()) == pytest.approx(float(result.low.mean()))


def test_fresh_decomposition_is_exact_too():
    _, _, _, probe = train("opt", fresh=lm_batches(seed=9), sketch=16)
    result = probe.decompose()
    assert np.array_equal(result.low, result.high)
    assert result.identity_error() <= 1e-12 * max(1.0, abs(float(result.low.mean())))
