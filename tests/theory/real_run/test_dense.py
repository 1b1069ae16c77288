"""The second measurement of a chain agrees with a sound probe, and names the check that an error in the probe fails."""

from dataclasses import replace

import pytest

from tests.theory.real_run.chains import MODELS, lm_batches, train
from theory import llm_gap
from theory.checks import FAIL, PASS
from theory.real_run import decomposition
from theory.real_run.decomposition import LayerGap
from theory.real_run.dense import recheck
from theory.real_run.probe import GapProbe

GAP, SLOPE = "gap = dense gradient's", "<G, BA> = slope of the loss"


@pytest.mark.parametrize("name", MODELS)
def test_a_sound_probe_agrees(name):
    _, _, _, probe = train(name, sketch=16)
    checks = recheck(probe, probe.decompose())
    assert [check.verdict for check in checks] == [PASS] * 6
    assert [check.name.split(" (")[0] for check in checks] == [GAP, SLOPE] * 3


def test_fresh_batches_agree_too():
    _, _, _, probe = train("opt", fresh=lm_batches(seed=9), sketch=16)
    assert FAIL not in {check.verdict for check in recheck(probe, probe.decompose())}


def test_the_model_keeps_its_weights():
    model, _, _, probe = train("mlp")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recheck(probe, probe.decompose())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


INTERVAL, LAYER = decomposition._gap, GapProbe._layer


def scaled(layer, delta, rank):
    return tuple(3 * end for end in INTERVAL(layer, delta, rank))


def one(layer, delta, rank):
    return 1.0, 1.0


def layer_with(**changes):
    """A probe whose layers have other numbers; each change is a function of the right one."""

    def wrong(self, first, second, sketch):
        found: LayerGap = LAYER(self, first, second, sketch)
        return replace(found, **{name: change(getattr(found, name)) for name, change in changes.items()})

    return wrong


# where, what is planted there, the check that must fail
PLANTS = {
    "every gap times 3": (decomposition, "_gap", scaled, GAP),
    "every gap is 1": (decomposition, "_gap", one, GAP),
    "sigma doubled": (GapProbe, "_layer", layer_with(sigma=lambda s: tuple(2 * x for x in s)), GAP),
    "the sign of the pairing flipped": (GapProbe, "_layer", layer_with(pairing=lambda x: -x), GAP),
    "the sign of the link flipped": (GapProbe, "_layer", layer_with(moved=lambda x: -x), SLOPE),
    "the link halved": (GapProbe, "_layer", layer_with(moved=lambda x: x / 2), SLOPE),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_plant_is_caught_by_name_and_sets_the_exit_status(plant, tmp_path, capsys, monkeypatch):
    owner, name, wrong, check = PLANTS[plant]
    monkeypatch.setattr(owner, name, wrong)
    monkeypatch.setattr(llm_gap.plots, "chain_gap", lambda result, path: path)  # the picture takes longer than the run
    assert llm_gap.main(["--model", "random", "--epochs", "1", "--out", str(tmp_path)]) == 1
    assert f"FAIL {check} (link" in capsys.readouterr().out
