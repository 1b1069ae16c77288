"""Each option of PEFT's LoraConfig is taken, harmless to a chain, or refused by name; and later links start alike."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from cola import Chain, ChainOptimizer, LinkConfig, NeverKnots, StepKnots
from cola.lora.config import link_config_of
from cola.lora.per_layer import PER_LAYER, TOKENS
from tests.models import tiny_opt

peft = pytest.importorskip("peft")

IDS = torch.arange(48).view(4, 12) * 7 % 32


class Wide(nn.Module):
    """One layer that is large enough to tell distributions apart."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(400, 64)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(64, 400, generator=generator) / 20)
            self.layer.bias.zero_()

    def forward(self, x):
        return self.layer(x)


def lora(**changes):
    return peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ["layer"], **changes})


def wrapped(base=None, how="get_peft_model", **changes):
    base = Wide() if base is None else base
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if how == "inject":
            return peft.inject_adapter_in_model(lora(**changes), base)
        if how == "add_adapter":
            base.add_adapter(lora(**changes))
            return base
        return peft.get_peft_model(base, lora(**changes))


def chained(model, **kwargs):
    return ChainOptimizer(torch.optim.AdamW, model, kwargs.pop("policy", NeverKnots()), lr=1e-2, **kwargs)


def step(model, opt):
    inputs = torch.randn(4, 400, generator=torch.Generator().manual_seed(1))
    model(inputs).square().mean().backward()
    opt.step()
    opt.zero_grad()


def first(opt):
    return next(iter(opt.live.layers.values()))


# how links start

STARTS = {
    "default": ({}, {}, 1 / math.sqrt(3 * 400)),
    "none": ({"init_lora_weights": False}, {}, 1 / math.sqrt(3 * 400)),
    "gaussian": ({"init_lora_weights": "gaussian"}, {}, 1 / 8),
    "Gaussian": ({"init_lora_weights": "Gaussian"}, {}, 1 / 8),
    "asked for": ({"init_lora_weights": True}, {"init": "gaussian"}, 1 / 8),
    "selected": ({}, {"init": "selector"}, 1 / math.sqrt(400)),
    "eva": ({"init_lora_weights": "eva"}, {}, 1 / math.sqrt(400)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", STARTS)
def test_later_links_start_as_peft_started_the_first(case):
    """3200 draws have their standard deviation within 1/sqrt(2·3200) of itself, 1.3 %; 5 of these are allowed."""
    options, link, deviation = STARTS[case]
    model = wrapped(**options)
    opt = chained(model, link=LinkConfig(**link))
    before = first(opt).lora_A.detach().square().mean().sqrt().item()
    if not link and case != "eva":  # which PEFT draws from data that is not here
        assert before == pytest.approx(deviation, rel=0.07)
    step(model, opt)
    opt.tie()
    assert first(opt).lora_A.detach().square().mean().sqrt().item() == pytest.approx(deviation, rel=0.07)
    assert not first(opt).lora_B.any()


@pytest.mark.parametrize("how", ["get_peft_model", "inject", "add_adapter"])
def test_pefts_init_is_found_however_its_layers_got_there(how):
    model = wrapped(tiny_opt(), how, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian", r=4)
    assert chained(model).live.config.init == "gaussian"
    model = wrapped(tiny_opt(), how, target_modules=["q_proj", "v_proj"], r=4)
    assert chained(model).live.config.init == "kaiming"


def test_an_adapter_deep_inside_a_model_is_found():
    model = nn.Sequential(nn.Identity(), wrapped(init_lora_weights="gaussian"))
    assert chained(model).live.config.init == "gaussian"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("init", "ours"), [("orthogonal", "orthogonal"), ("olora", "kaiming"), ("pissa", "kaiming")])
def test_an_init_that_later_links_cannot_repeat_is_named(init, ours, caplog):
    model = wrapped(init_lora_weights=init)
    opt = chained(model)
    assert opt.live.config.init == ours
    (record,) = [r for r in caplog.records if "later links start by" in r.message]
    assert f"init_lora_weights='{init}'; later links start by init='{ours}'" in record.message


# a base that PEFT changes first


def changing(init):
    changes = {"init_lora_weights": init}
    if init == "loftq":  # PEFT needs a GPU for it
        model = wrapped()
        model.peft_config["default"].init_lora_weights = init
        with torch.no_grad():
            model.base_model.model.layer.base_layer.weight.mul_(0.9)
        return model
    if init == "corda":
        config = peft.tuners.lora.config.CordaConfig(corda_method="kpm")
        changes["corda_config"] = config
        base = Wide()
        setting = lora(**changes)
        inputs = torch.randn(64, 400, generator=torch.Generator().manual_seed(2))
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(base, setting, run_model=lambda: base(inputs))
        return peft.get_peft_model(base, setting)
    if init == "lora_ga":
        from peft.tuners.lora.config import LoraGAConfig
        from peft.tuners.lora.loraga import preprocess_loraga

        base, setting = Wide(), lora(**changes, lora_ga_config=LoraGAConfig())
        inputs = torch.randn(8, 400, generator=torch.Generator().manual_seed(2))
        preprocess_loraga(base, setting, train_step=lambda: base(inputs).square().mean().backward())
        return peft.get_peft_model(base, setting)
    return wrapped(**changes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_a_chain_on_a_base_that_peft_has_changed_is_not_exported_for_the_original(init, tmp_path):
    model = changing(init)
    name = "base_model.model.layer.base_layer.weight"
    assert not torch.equal(model.state_dict()[name], Wide().layer.weight), "PEFT left the base alone"
    opt = chained(model)
    step(model, opt)
    opt.finish()
    for number, chain in enumerate((opt.chain, reloaded(opt.chain, tmp_path / "chain"), carried(opt.chain))):
        with pytest.raises(ValueError, match=f"init_lora_weights='{init}' has changed the base.*Save the merged model"):
            chain.to_peft(tmp_path / f"{number}")
        assert not (tmp_path / f"{number}").exists()


def reloaded(chain, directory):
    chain.save(directory)
    return Chain.load(directory)


def carried(chain):
    other = Chain()
    other.load_state_dict(chain.state_dict())
    return other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_inits_that_leave_the_base_alone_are_exported(init, tmp_path):
    model = wrapped(init_lora_weights=init)
    opt = chained(model, policy=StepKnots(every=1))
    step(model, opt)
    step(model, opt)
    opt.finish()
    opt.chain.to_peft(tmp_path)
    inputs = torch.randn(4, 400)
    adapted = peft.PeftModel.from_pretrained(Wide(), tmp_path)
    assert torch.allclose(adapted(inputs), model(inputs), atol=1e-5)


# all fields

HARMLESS, TAKEN, REFUSED, OFF = "harmless", "taken", "refused", "needs another field, or hardware that is not here"
FIELDS = {
    "task_type": HARMLESS, "peft_type": HARMLESS, "auto_mapping": HARMLESS, "peft_version": HARMLESS,
    "base_model_name_or_path": HARMLESS, "revision": HARMLESS, "inference_mode": HARMLESS, "r": TAKEN,
    "target_modules": TAKEN, "exclude_modules": HARMLESS, "lora_alpha": TAKEN, "lora_dropout": TAKEN,
    "fan_in_fan_out": HARMLESS, "bias": TAKEN, "use_rslora": TAKEN, "modules_to_save": TAKEN,
    "init_lora_weights": TAKEN, "layers_to_transform": HARMLESS, "layers_pattern": HARMLESS, "rank_pattern": TAKEN,
    "alpha_pattern": TAKEN, "megatron_config": OFF, "megatron_core": HARMLESS, "trainable_token_indices": REFUSED,
    "loftq_config": OFF, "eva_config": OFF, "corda_config": OFF, "lora_ga_config": OFF, "use_dora": REFUSED,
    "velora_config": REFUSED, "alora_invocation_tokens": REFUSED, "use_qalora": OFF, "qalora_group_size": HARMLESS,
    "monteclora_config": REFUSED, "layer_replication": REFUSED, "runtime_config": HARMLESS, "lora_bias": REFUSED,
    "target_parameters": REFUSED, "use_bdlora": REFUSED, "arrow_config": REFUSED, "kasa_config": REFUSED,
    "ensure_weight_tying": HARMLESS,
}  # fmt: skip


def test_each_field_of_pefts_configuration_has_been_decided():
    names = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert names - FIELDS.keys() == set()


def config_of(name, **arguments):
    return getattr(peft.tuners.lora.config, name)(**arguments)


#: values of the fields that are not taken in other tests; PEFT sets `arrow_config` by create_arrow_model alone
VALUES = {
    "use_dora": lambda: True,
    "lora_bias": lambda: True,
    "velora_config": lambda: config_of("VeloraConfig"),
    "monteclora_config": lambda: config_of("MontecloraConfig"),
    "kasa_config": lambda: config_of("KasaConfig"),
    "use_bdlora": lambda: config_of("BdLoraConfig", target_modules_bd_a=["q_proj"], match_strict=False, nblocks=2),
    "alora_invocation_tokens": lambda: [1, 2],
    "trainable_token_indices": lambda: [1, 2],
    "target_parameters": lambda: ["k_proj.weight"],
    "layer_replication": lambda: [[0, 2], [1, 2]],
    "exclude_modules": lambda: ["k_proj"],
    "inference_mode": lambda: True,
    "layers_to_transform": lambda: [0],
    "layers_pattern": lambda: "layers",
    "qalora_group_size": lambda: 4,
    "megatron_core": lambda: "other",
    "revision": lambda: "main",
    "ensure_weight_tying": lambda: True,
    "runtime_config": lambda: config_of("LoraRuntimeConfig", ephemeral_gpu_offload=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("field", VALUES)
def test_a_field_that_is_set_is_refused_by_name_or_changes_nothing(field, tmp_path):
    changes = {field: VALUES[field]()}
    if field == "layers_pattern":
        changes["layers_to_transform"] = [0]
    if field == "layer_replication":
        base, changes["target_modules"] = tiny_llama(), ["q_proj"]
    else:
        base, changes["target_modules"] = tiny_opt(), ["q_proj", "v_proj"]
    make = type(base)
    model = wrapped(base, r=4, **changes)
    if FIELDS[field] == REFUSED:
        with pytest.raises(ValueError, match=r"PEFT|model: \w+="):
            chained(model)
        return
    opt = chained(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    opt.step()
    opt.finish()
    opt.chain.to_peft(tmp_path)
    plain = tiny_opt() if make is type(tiny_opt()) else tiny_llama()
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert torch.allclose(adapted(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


@pytest.mark.parametrize(
    ("ranks", "change", "fits"), [((8, 4), "mask", True), ((8, 9), "mask", False), ((8, 9), "auto", True)]
)
def test_masked_ranks_beyond_pefts_room_are_refused_before_training(ranks, change, fits):
    link = LinkConfig(r=ranks, rank_change=change)
    if fits:
        ChainOptimizer(torch.optim.SGD, wrapped(), StepKnots(every=1), link=link, lr=0.1).tie()
    else:
        with pytest.raises(ValueError, match=r"needs rank 9, and PEFT's layer 'layer' has room for 8"):
            ChainOptimizer(torch.optim.SGD, wrapped(), StepKnots(every=1), link=link, lr=0.1)


# a LoraConfig in place of a LinkConfig

#: options of a LoraConfig, and what they are in a LinkConfig
CARRIED = {
    "defaults": ({}, {}),  # PEFT's lora_alpha is 8
    "rank and scale": ({"r": 4, "lora_alpha": 2}, {"r": 4, "lora_alpha": 2}),
    "names": ({"target_modules": ["v_proj", "k_proj"]}, {"target_modules": ["k_proj", "v_proj"]}),
    "a regular expression": ({"target_modules": r".*\.fc1"}, {"target_modules": r".*\.fc1"}),
    "all linear": ({"target_modules": "all-linear"}, {"target_modules": "all-linear"}),
    "dropout": ({"lora_dropout": 0.1}, {"lora_dropout": 0.1}),
    "biases": ({"bias": "lora_only"}, {"bias": "lora_only"}),
    "a head": ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ("lm_head",)}),
    "gaussian": ({"init_lora_weights": "gaussian"}, {"init": "gaussian"}),
    "rslora": ({"use_rslora": True}, {"scaling": "rslora"}),
    "neutral": ({"revision": "main", "fan_in_fan_out": True}, {}),
    "rows of new tokens": ({"trainable_token_indices": [7, 3]}, {"trainable_token_indices": [7, 3]}),
    "a task": ({"task_type": "CAUSAL_LM"}, {"task_type": "CAUSAL_LM"}),
    "a head that the task trains": (
        {"task_type": "SEQ_CLS", "modules_to_save": ["score", "lm_head"]},
        {"task_type": "SEQ_CLS", "modules_to_save": ("score", "lm_head")},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CARRIED)
def test_a_lora_config_is_taken_for_the_link_config_that_says_the_same(case):
    theirs, ours = CARRIED[case]
    expected = LinkConfig(**{"lora_alpha": 8, **ours})
    assert link_config_of(peft.LoraConfig(**theirs)) == expected
    if "score" not in str(theirs):
        assert chained(tiny_opt(), link=peft.LoraConfig(**theirs)).live.config == expected


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_config_has_the_scales_of_pefts_own_layers(rslora):
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=["q_proj", "v_proj"])
    opt, model = chained(tiny_opt(), link=config), peft.get_peft_model(tiny_opt(), config)
    theirs = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")}
    assert theirs == {layer.scaling for layer in opt.live.layers.values()}


#: options that a LinkConfig has no place for, by what the refusal says of each
NOT_CARRIED = {
    "bias": ("all", r"bias='all' .*opt\.add_param_group"),
    "init_lora_weights": ("pissa", r"init_lora_weights='pissa' .*choose init"),
    "inference_mode": (True, r"inference_mode=True .*leave it out"),
}
#: options that PEFT resets or refuses by themselves
NEEDS_OTHERS = {"layers_pattern", "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
                "use_qalora", "arrow_config"}  # fmt: skip
NOT_A_SETTING = {"qalora_group_size", "megatron_core", "revision", "runtime_config", "peft_type", "auto_mapping",
                 "peft_version", "base_model_name_or_path", "fan_in_fan_out"}  # fmt: skip
for field in sorted(VALUES.keys() - {*PER_LAYER, TOKENS} - NOT_CARRIED.keys() - NEEDS_OTHERS - NOT_A_SETTING):
    NOT_CARRIED[field] = VALUES[field], rf"{field}=.*(leave it out|modules_to_save|larger model first)"


def test_every_field_is_carried_over_refused_or_no_setting():
    taken = {name for name, what in FIELDS.items() if what == TAKEN}
    taken |= {*PER_LAYER, TOKENS}
    names = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert names - taken - NOT_CARRIED.keys() - NEEDS_OTHERS - NOT_A_SETTING == set()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("field", NOT_CARRIED)
def test_what_cannot_be_carried_over_is_refused_by_name_before_anything_changes(field):
    value, message = NOT_CARRIED[field]
    model = tiny_opt()
    names = [*model.state_dict()]
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], field: value() if callable(value) else value})
    with pytest.raises(ValueError, match=rf"^link=LoraConfig\(\.\.\.\): .*{message}"):
        chained(model, link=config)
    assert [*model.state_dict()] == names


def test_all_options_that_are_refused_are_named_at_once():
    config = peft.LoraConfig(use_dora=True, bias="all", rank_pattern={"q_proj": 2})
    with pytest.raises(ValueError, match=r"bias='all'.*; use_dora=True .*s·BA"):
        chained(tiny_opt(), link=config)
    with pytest.raises(ValueError, match=r"link=AdaLoraConfig\(\.\.\.\) is more than LoRA"):
        chained(tiny_opt(), link=peft.AdaLoraConfig(total_step=9))


# PEFT's words elsewhere

WORDS = {
    "a rank": (lambda: on_base(r=8), r"^AdamW does not take r: give link=LinkConfig\(r=8\)$"),
    "two options": (
        lambda: on_base(r=8, target_modules="all-linear"),
        r"^AdamW does not take r, target_modules: give link=LinkConfig\(r=8, target_modules='all-linear'\)$",
    ),
    "PEFT's word": (lambda: on_base(use_rslora=True), r"does not take use_rslora: .*scaling='rslora'"),
    "another's word": (lambda: on_base(lora_rank=8), r"does not take lora_rank: .*did you mean r\?"),
    "an own callable": (
        lambda: on_base(base=lambda params: torch.optim.AdamW(params), lora_dropout=0.1),
        r"<lambda> does not take lora_dropout: give link=LinkConfig\(lora_dropout=0\.1\)",
    ),
    "neither's": (lambda: on_base(momentum=0.9), r"AdamW does not take momentum: leave momentum=0\.9 out"),
    "mistyped": (lambda: on_base(verbos=True), r"AdamW does not take verbos: did you mean verbose\?"),
    "the base's, mistyped": (lambda: on_base(weigth_decay=0.1), r"did you mean weight_decay\?"),
    "a name for names": (
        lambda: link_config_of(peft.LoraConfig(modules_to_save="head")),
        r"modules_to_save='head' must be a list",
    ),
    "rslora": (lambda: LinkConfig(use_rslora=True), r"LinkConfig: use_rslora=True .*scaling='rslora'"),
    "init": (lambda: LinkConfig(init_lora_weights="gaussian"), r"init_lora_weights='gaussian' .*choose init"),
    "a typing error": (lambda: LinkConfig(lora_alhpa=2), r"lora_alhpa=2 is unknown .*did you mean lora_alpha\?"),
    "unknown": (lambda: LinkConfig(zzz=2), r"LinkConfig: zzz=2 is unknown to a LinkConfig: leave it out"),
}


def on_base(base=torch.optim.AdamW, **options):
    model = Wide()
    try:
        ChainOptimizer(base, model, NeverKnots(), link=LinkConfig(target_modules="all-linear"), **options)
    finally:
        assert type(model.layer) is nn.Linear


@pytest.mark.parametrize("case", WORDS)
def test_options_of_links_in_other_places_or_words_say_where_they_belong(case):
    call, message = WORDS[case]
    with pytest.raises(TypeError, match=message):
        call()


def test_a_base_that_takes_such_a_word_gets_it():
    class Ranked(torch.optim.SGD):
        def __init__(self, params, lr=0.1, r=0, **rest):
            super().__init__(params, lr=lr)
            self.taken = r, rest

    link = LinkConfig(target_modules="all-linear")
    opt = ChainOptimizer(Ranked, Wide(), NeverKnots(), link=link, r=3, lora_alpha=4)
    assert opt.base.taken == (3, {"lora_alpha": 4})
