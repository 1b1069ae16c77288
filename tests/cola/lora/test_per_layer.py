"""Choices per layer are PEFT's: the same layers, ranks, scales and heads; what cannot be meant is refused."""

import pytest
import torch
from torch import nn

from cola import ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from tests.models import tiny_opt

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(48).view(4, 12) * 7 % 32


def chained(model, policy=None, **link):
    options = {"r": 4, "lora_alpha": 8, **link}
    return ChainOptimizer(torch.optim.AdamW, model, policy or NeverKnots(), link=LinkConfig(**options), lr=1e-2)


def ours(**link):
    """Path -> rank and scale of the layers that a chain adapts."""
    layers = chained(tiny_opt(), **link).live.layers
    return {path: (layer.lora_A.shape[0], layer.scaling) for path, layer in layers.items()}


def theirs(**config):
    model = peft.get_peft_model(tiny_opt(), peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))
    return {
        path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


QV = ["q_proj", "v_proj"]
#: options that PEFT takes too
ALIKE = {
    "excluded by name": {"target_modules": [*QV, "fc1"], "exclude_modules": ["fc1"]},
    "excluded by path": {"target_modules": QV, "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "excluded by expression": {"target_modules": QV, "exclude_modules": r".*\.0\..*"},
    "from all": {"target_modules": "all-linear", "exclude_modules": ["fc1", "fc2"]},
    "one layer": {"target_modules": QV, "layers_to_transform": 1},
    "layers": {"target_modules": QV, "layers_to_transform": [0, 1]},
    "of a named list": {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"},
    "of several": {"target_modules": QV, "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    "rank by name": {"target_modules": QV, "rank_pattern": {"v_proj": 2}},
    "rank by path": {"target_modules": QV, "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 1}},
    "the first fitting": {"target_modules": QV, "rank_pattern": {r"0\.self_attn\.v_proj": 1, "v_proj": 3}},
    "anchored": {"target_modules": QV, "rank_pattern": {r"^model\.decoder\.layers\.1\.self_attn\.q_proj": 2}},
    "alpha": {"target_modules": QV, "alpha_pattern": {"q_proj": 3}},
    "rank and alpha": {
        "target_modules": QV, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 1, "q_proj": 5},
    },
    "all together": {
        "target_modules": [*QV, "k_proj"], "exclude_modules": ["k_proj"], "layers_to_transform": [1],
        "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 2},
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ALIKE)
def test_layers_ranks_and_scales_are_pefts(case):
    options = ALIKE[case]
    expected = theirs(**options)
    assert expected
    assert ours(**options) == expected
    assert chained(tiny_opt(), **options).live.config == LinkConfig(r=4, lora_alpha=8, **options)
    config = peft.LoraConfig(r=4, lora_alpha=8, **options)
    opt = ChainOptimizer(torch.optim.AdamW, tiny_opt(), NeverKnots(), link=config, lr=1e-2)
    assert {path: (layer.rank, layer.scaling) for path, layer in opt.live.layers.items()} == expected


def test_a_root_scale_follows_each_layers_rank():
    link = {"target_modules": QV, "rank_pattern": {"v_proj": 1}, "scaling": "rslora"}
    found = ours(**link)
    assert found == theirs(target_modules=QV, rank_pattern={"v_proj": 1}, use_rslora=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["rank and alpha", "all together"])
def test_such_a_chain_is_tied_resumed_and_exported(case, tmp_path):
    link = {**ALIKE[case], "r": (4, 2)}
    model = tiny_opt()
    opt = chained(model, StepKnots(every=2), **link)

    def steps(model, opt, count):
        for _ in range(count):
            model(input_ids=IDS, labels=IDS).loss.backward()
            opt.step()
            opt.zero_grad()

    steps(model, opt, 3)
    opt.save(tmp_path / "run")
    steps(model, opt, 2)
    again = tiny_opt()
    resumed = chained(again, StepKnots(every=2), **link)
    resumed.load(tmp_path / "run")
    steps(again, resumed, 2)
    for one in (opt, resumed):
        one.finish()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    links = [*opt.chain]
    ranks = {path: [link.factors[path].rank for link in links] for path in links[0].factors}
    firsts = {path: rank for path, (rank, _) in theirs(**ALIKE[case]).items()}
    assert ranks == {path: [r, -(-r // 2), -(-r // 2)] for path, r in firsts.items()}
    opt.chain.to_peft(tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(tiny_opt(), tmp_path / "adapter")
    assert torch.allclose(adapted(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5)


def test_a_run_with_other_layers_or_ranks_is_not_resumed(tmp_path):
    opt = chained(tiny_opt(), target_modules=QV, rank_pattern={"v_proj": 2})
    opt.save(tmp_path)
    for other in ({"rank_pattern": {"v_proj": 3}}, {}, {"rank_pattern": {"v_proj": 2}, "exclude_modules": ["v_proj"]}):
        other = other if "exclude_modules" not in other else {"exclude_modules": ["v_proj"]}
        with pytest.raises(ValueError, match="layers"):
            chained(tiny_opt(), target_modules=QV, **other).load(tmp_path)


def test_an_excluded_layer_need_not_be_able_to_carry_a_link(caplog):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[1].weight
    with pytest.raises(ValueError, match="is tied"):
        chained(model, target_modules=["0", "1"])
    opt = chained(model, target_modules=["0", "1"], exclude_modules=["1"])
    assert [*opt.live.layers] == ["0"]
    opt.finish()
    chained(model, target_modules="all-linear", exclude_modules=["1", "2"])
    assert "leaves out" not in caplog.text


# refusals

REFUSED = {
    "a name that excludes nothing": (
        {"exclude_modules": ["fc1"]}, r"exclude_modules='fc1' matches none of the targets, called v_proj, q_proj",
    ),
    "a misspelt name": ({"exclude_modules": ["q_prj"]}, r"exclude_modules='q_prj' matches none .*called q_proj"),
    "an expression that excludes nothing": (
        {"exclude_modules": "q_proj"}, r"exclude_modules='q_proj' matches none .*whole path; for names give a list",
    ),
    "all are excluded": ({"exclude_modules": QV}, r"leaves none of the targets, called v_proj, q_proj"),
    "no expression": ({"exclude_modules": "("}, r"exclude_modules: '\(' is not a regular expression"),
    "no names": ({"exclude_modules": 3}, r"exclude_modules=3 must be a list of names"),
    "a layer that is not there": (
        {"layers_to_transform": [0, 7]}, r"no target is in layer 7; the targets are in layers 0 to 1",
    ),
    "a list that is not there": (
        {"layers_to_transform": 0, "layers_pattern": "h"},
        r"no target is in layer 0; the targets are in no numbered layer of 'h'",
    ),
    "no number": ({"layers_to_transform": "1"}, r"layers_to_transform='1' must be the numbers of layers"),
    "none at all": ({"layers_to_transform": []}, r"layers_to_transform=\[\] must be"),
    "a negative one": ({"layers_to_transform": -1}, r"layers_to_transform=-1 must be"),
    "a list without numbers": ({"layers_pattern": "layers"}, r"layers_pattern='layers' .*give both"),
    "a rank for nothing": (
        {"rank_pattern": {"fc1": 2}}, r"rank_pattern=\{'fc1': …\} matches none of the adapted layers, called",
    ),
    "a rank that is never reached": (
        {"rank_pattern": {"q_proj": 2, r"0\.self_attn\.q_proj": 1}},
        r"rank_pattern=\{'0\\\\.self_attn\\\\.q_proj': …\} is never reached",
    ),
    "rank 0": ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern=\{'q_proj': 0\} must give a positive integer"),
    "half a rank": ({"rank_pattern": {"q_proj": 1.5}}, r"must give a positive integer"),
    "alpha 0": ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern=\{'q_proj': 0\} must give a positive number"),
    "no table of ranks": ({"rank_pattern": ["q_proj"]}, r"rank_pattern=\['q_proj'\] must be a dict"),
    "no table of scales": ({"alpha_pattern": None}, r"alpha_pattern=None must be a dict .*leave it out for none"),
    "no name of a list": ({"layers_to_transform": 0, "layers_pattern": 3}, r"layers_pattern=3 must be a list of names"),
    "no pattern": ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is not a regular expression"),
    "a task": ({"task_type": "SEQ_CLASS"}, r"task_type='SEQ_CLASS' is unknown: choose one of 'SEQ_CLS'"),
    "no head": (
        {"task_type": "SEQ_CLS"}, r"task_type='SEQ_CLS' trains the head, called classifier or score, and .* has none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused_before_anything_changes(case):
    options, message = REFUSED[case]
    model = tiny_opt()
    names = [*model.state_dict()]
    with pytest.raises((ValueError, TypeError), match=message):
        chained(model, target_modules=QV, **options)
    assert [*model.state_dict()] == names


def test_a_configuration_can_be_a_key():
    assert hash(LinkConfig(r=2, rank_pattern={"q_proj": 4})) == hash(LinkConfig(r=2, rank_pattern={"q_proj": 4}))


@pytest.mark.parametrize("option", ["exclude_modules", "layers_to_transform", "rank_pattern", "task_type"])
def test_pefts_own_layers_are_used_as_they_are(option):
    values = {
        "exclude_modules": ["q_proj"],
        "layers_to_transform": 0,
        "rank_pattern": {"q_proj": 2},
        "task_type": "SEQ_CLS",
    }
    model = peft.get_peft_model(tiny_opt(), peft.LoraConfig(r=4, target_modules=QV))
    with pytest.raises(ValueError, match=rf"link=LinkConfig\({option}=.*conflicts with the model's PEFT layers"):
        ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=LinkConfig(**{option: values[option]}))


# heads


def classifier():
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(config)


@pytest.mark.parametrize("how", ["link", "LoraConfig"])
@pytest.mark.parametrize("targets", [QV, "all-linear"])
def test_a_task_trains_a_fresh_head_and_the_export_has_it(how, targets, tmp_path, caplog):
    model = classifier()
    link = {"link": LinkConfig, "LoraConfig": peft.LoraConfig}[how](r=4, target_modules=targets, task_type="SEQ_CLS")
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=link, lr=1e-2)
    assert "stays frozen" not in caplog.text
    before = model.score.weight.detach().clone()
    for _ in range(3):
        model(input_ids=IDS, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        opt.step()
        opt.zero_grad()
    opt.finish()
    assert not torch.equal(model.score.weight, before)
    opt.chain.to_peft(tmp_path)
    adapted = peft.PeftModel.from_pretrained(classifier(), tmp_path)
    assert torch.allclose(adapted(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5)


def test_a_task_without_a_head_changes_nothing():
    opt = chained(tiny_opt(), target_modules=QV, task_type="CAUSAL_LM")
    assert not opt.live.trained()
