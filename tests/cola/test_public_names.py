"""The public names of the public classes, in full: a new one is a decision, and is written down here."""

import pytest
import torch
from torch import nn

import cola

LINK = cola.LinkConfig(r=1, target_modules="all-linear")


def optimizer():
    return cola.ChainOptimizer(torch.optim.SGD, nn.Sequential(nn.Linear(2, 2)), policy=cola.NeverKnots(), link=LINK)


REPORT = cola.KnotReport(0, 1, 1, 1.0, 0.0, None, 0.0)
FACTOR = cola.Factor(torch.ones(1, 2), torch.ones(2, 1), 1.0, "nearest")

POLICY = "knotted load_state_dict state_dict unreached update"
WINDOWS = f"{POLICY} best cooldown cooling knots max_links share steps_in_window total_steps values window"

#: an instance of each class (or the class), the names of torch's class below it, and its own names
NAMES = {
    "ChainOptimizer": (
        optimizer(),
        torch.optim.Optimizer([nn.Parameter(torch.ones(1))], {}),
        "base chain coverage eval finish finished follow live load merged model observe on_knot policy "
        "print_trainable_parameters register_for_checkpointing reports reset save steps tie train undo",
    ),
    "Chain": (
        cola.Chain(),
        object(),
        "apply base delta effective_rank from_peft keep layers live load load_state_dict missing norms overlap plot "
        "save singular_values state_dict summary to_peft undo",
    ),
    "Link": (cola.Link(0, 0, {}, {}, REPORT), object(), "factors index rank report rows seed step trained"),
    "Factor": (FACTOR, object(), "A B cpu delta form norm rank rounding scaling shape start triples"),
    "KnotReport": (REPORT, object(), "delta_norm index layers loss lost lost_norm rank seconds share step to_dict"),
    "LayerReport": (cola.LayerReport(1.0, 0.0, "nearest"), object(), "delta_norm lost_norm rounding share weight_norm"),
    "ChainSummary": (cola.Chain().summary(), object(), "rows texts title to_dict to_frame"),
    "LinkConfig": (
        LINK,
        object(),
        "alpha_pattern bias dtype exclude_modules init known_ranks layers_pattern layers_to_transform lora_alpha "
        "lora_dropout modules_to_save parts r rank_change rank_of rank_pattern residual_device scaling scaling_of "
        "target_modules target_parameters task_type train trainable_token_indices",
    ),
    "Signal": (cola.Signal(1), object(), "epoch loss mean opt step"),
    "NeverKnots": (cola.NeverKnots(), object(), POLICY),
    "StepKnots": (cola.StepKnots(every=1), object(), f"{POLICY} at every"),
    "EpochKnots": (cola.EpochKnots(at=[1]), object(), f"{POLICY} at done steps_per_epoch"),
    "EvenKnots": (cola.EvenKnots(1, 1), object(), f"{POLICY} length total_steps"),
    "PlateauKnots": (cola.PlateauKnots(), object(), f"{WINDOWS} bad_windows deaf_steps means mode patience threshold"),
    "GapKnots": (cola.GapKnots(), object(), WINDOWS),
    "AdaptedLayer": (
        cola.AdaptedLayer,
        nn.Module,
        "added attach borrowers detach entries factors form held holder is_transposed kind linear link looks_up "
        "lora_down lora_up matches matrix obstacle over parameter parts plain_class plain_weight put put_back "
        "quantized refusal shape sides tie transposed",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_public_names_of_a_class_are_these(name):
    thing, below, names = NAMES[name]
    found = {attribute for attribute in set(dir(thing)) - set(dir(below)) if not attribute.startswith("_")}
    assert found == set(names.split())


def test_every_class_in_the_package_is_listed():
    classes = {name for name in cola.__all__ if isinstance(getattr(cola, name), type)}
    errors = {name for name in classes if issubclass(getattr(cola, name), Exception)}
    assert classes - errors - {"KnotPolicy", "LinkStart"} <= set(NAMES)  # an abstract class, and plain values
