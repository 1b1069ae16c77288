"""Links of every kind: equal budgets, the vertices' alignment, and the first-order account of what a link gains."""

import copy
import itertools

import numpy as np
import pytest
import torch

from tests.theory.real_run.chains import mlp, mlp_batches, mlp_loss
from theory.real_run.balls import Ball
from theory.real_run.kinds import (
    Kind,
    ManyVertices,
    OneVertex,
    Task,
    Trained,
    kinds,
    newton_schulz_vertices,
    random_vertices,
    vertices,
)
from theory.real_run.side_by_side import Budget, run_links, table, tuned

pytestmark = pytest.mark.numerics

BATCHES = mlp_batches()
BUDGET = Budget(links=1, steps=len(BATCHES))
# float32 gradients and changes, relative to the terms' size
CLOSE = 1e-4


def made(loss=mlp_loss):
    """Training reads the very batches of the fixed loss, in their order."""
    return Task(mlp(), ["0", "3"], loss, lambda seed: itertools.cycle(BATCHES), BATCHES, mlp_batches(seed=3))


KINDS = {kind.name: kind for kind in kinds(rank=2)}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_takes_one_gradient_of_each_batch(name):
    """Counted as calls of the loss with gradients; the weights end changed and the model as it was otherwise."""
    calls = []

    def counting(model, batch):
        calls.append(torch.is_grad_enabled())
        return mlp_loss(model, batch)

    place = made(counting)
    before = copy.deepcopy(place.model.state_dict())
    for links in (1, 3):
        calls.clear()
        run_links(place, KINDS[name], 0.01, Budget(links, 4), 0, probed=False)
        assert sum(calls) == links * 4
    after = place.model.state_dict()
    assert set(after) == set(before)
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert torch.equal(after["0.bias"], before["0.bias"])
    assert all(torch.equal(value, before[key]) for key, value in place.restored().state_dict().items())


@pytest.mark.parametrize("name", KINDS)
def test_the_account_of_a_link(name):
    """best - error - bend = drop, against the dense gradient and the dense change."""
    place = made()
    found = run_links(place, KINDS[name], 0.02, BUDGET, 0)
    change = {p: (m.weight - place._start[f"{p}.weight"]).double() for p, m in place.modules().items()}
    place.restored()
    start, gradient = place.mean_loss(BATCHES), {p: g.double() for p, g in place.gradient(BATCHES).items()}
    promised = -sum(float((gradient[p] * change[p]).sum()) for p in change)
    best = sum(float(torch.linalg.svdvals(change[p]).sum() * torch.linalg.svdvals(gradient[p])[0]) for p in change)
    spectral = sum(float(torch.linalg.svdvals(change[p])[0] * torch.linalg.svdvals(gradient[p]).sum()) for p in change)
    assert found.loss[0] == pytest.approx(start, rel=CLOSE)
    assert found.promised[0] == pytest.approx(promised, rel=CLOSE, abs=CLOSE * best)
    assert found.best[0] == pytest.approx(best, rel=CLOSE)
    assert found.spectral_best[0] == pytest.approx(spectral, rel=CLOSE)
    assert found.best - found.error - found.curvature == pytest.approx(found.drop)
    assert found.alignment[0] <= 1 + CLOSE
    assert found.spectral_alignment[0] <= 1 + CLOSE
    assert found.off < 4096


def test_the_best_vertices_are_aligned_and_random_ones_descend():
    """On the batches of the fixed loss, the trace ball's vertex has rho = 1, and the polar factor on its own ball."""
    trace, polar, drawn = (
        run_links(made(), OneVertex("", 1.0, make), 0.01, BUDGET, 0)
        for make in (vertices(Ball("rank", 1)), vertices(Ball("spectral")), random_vertices(2))
    )
    assert trace.alignment[0] == pytest.approx(1, abs=CLOSE)
    assert polar.spectral_alignment[0] == pytest.approx(1, abs=CLOSE)
    assert polar.alignment[0] < 0.9
    assert 0 < drawn.alignment[0] < 0.5


def test_muons_vertices_are_those_of_the_oracle():
    from theory.oracles.newton_schulz import newton_schulz

    G = {"x": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()}
    made = newton_schulz_vertices()(G, torch.Generator())["x"]
    assert np.allclose(made.numpy(), -newton_schulz(G["x"].numpy()), atol=1e-12)


def test_many_vertices_move_by_the_size_in_all():
    """With one batch a step per batch is the vertex itself; a trained link has its rank."""
    make = vertices(Ball("rank", 1))
    moved = []
    for kind in (OneVertex("", 1.0, make), ManyVertices("", 1.0, make)):
        place = made()
        place.restored()
        kind.link(place, BATCHES[:1], 0.1, 0)
        moved.append(place.model[0].weight.detach() - place._start["0.weight"])
    assert torch.allclose(*moved, atol=1e-6)
    place = made()
    Trained("", 1.0, 2, in_gradient=True).link(place, BATCHES * 3, 1e-2, 0)
    assert torch.linalg.matrix_rank(place.model[0].weight - place._start["0.weight"], atol=1e-5) == 2


class Along(Kind):
    """Scales all weights: its loss over the size has one valley."""

    def link(self, task, batches, size, seed):
        task.move({path: module.weight.detach().clone() for path, module in task.modules().items()}, -size)
        if size > 30:
            raise FloatingPointError


def test_the_size_is_tuned_to_an_inner_optimum():
    place = made()
    losses = {}
    for power in range(-6, 4):
        run_links(place, Along("", 1.0), 2.0**power, BUDGET, 0, probed=False)
        losses[2.0**power] = place.mean_loss(place.tuning)
    best = tuned(place, Along("", 2.0**-3), BUDGET, 0)
    with pytest.warns(UserWarning, match="no inner optimum within 1 moves"):
        tuned(place, Along("Along", 2.0**-6), BUDGET, 0, tries=1)
    neighbours = [losses[best / 2], losses[best], losses[2 * best]]
    assert min(neighbours) == losses[best]


def test_the_table_pairs_seeds_and_shows_one_row_per_kind():
    place = made()
    chosen = [OneVertex("first", 1.0, vertices(Ball("rank", 1))), OneVertex("second", 1.0, random_vertices(2))]
    runs = [run_links(place, kind, 0.02, BUDGET, seed) for kind in chosen for seed in (0, 1)]
    losses, account, note = table(runs, place.mean_loss(BATCHES)).split("\n\n")
    for block in (losses, account):
        assert [line.split()[0] for line in block.splitlines()[2:]] == ["first", "second"]
    gain = np.mean([a.loss[-1] - b.loss[-1] for a, b in zip(runs[:2], runs[2:])])
    assert f"{gain:.3f} ±" in losses.splitlines()[3]
    drop = np.mean([run.drop for run in runs[2:]])
    assert f"{drop:.3f}" in account.splitlines()[3]
    assert "95% intervals over 2 seeds" in note


def test_a_sketch_that_misses_directions_has_no_value_on_the_spectral_ball():
    run = run_links(made(), OneVertex("v", 1.0, vertices(Ball("rank", 1))), 0.02, Budget(1, 4, sketch=4), 0)
    assert np.isnan(run.spectral_alignment).all()
    assert np.isfinite(run.alignment).all()
    assert run.as_dict()["spectral_alignment"] == [None]
    assert table([run], 1.0).splitlines()[2].split()[-1] == "–"
