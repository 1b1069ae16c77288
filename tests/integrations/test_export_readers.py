"""An exported adapter says what other readers need: the model's task or class, plain names, one rank, no patterns."""

import json

import pytest
import torch
from torch import nn

from cola import Chain, ChainOptimizer, Factor, KnotReport, Link, LinkConfig, NeverKnots, StepKnots
from cola.chain import tensorfile
from cola.chain.architecture import Architecture
from tests.cola.chain.opt_chains import close, fit, output
from tests.models import Net, tiny_gpt2, tiny_opt

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(24).view(2, 12) * 7 % 32
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}


def bert(kind, seed=0):
    config = transformers.BertConfig(**SIZES, max_position_embeddings=32)
    return made(getattr(transformers, kind), config, seed)


def llama(kind, seed=0):
    return made(getattr(transformers, kind), transformers.LlamaConfig(**SIZES, pad_token_id=0), seed)


def t5(kind, seed=0):
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return made(getattr(transformers, kind), config, seed)


def made(kind, config, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).eval()


def outputs(model):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **more)[0]


def train(model, every=1, steps=2, **link):
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=every), link=LinkConfig(r=2, **link), lr=0.02)
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, **more)[0].square().mean().backward()
        opt.step()
        opt.zero_grad()
    opt.finish()
    return opt.chain


def config_of(directory):
    return json.loads((directory / "adapter_config.json").read_text())


# the class of the base

#: maker, class, what is trained besides, the task, the AutoPeftModel that reads it
CLASSES = {
    "Llama": (llama, "LlamaForCausalLM", {}, "CAUSAL_LM", "AutoPeftModelForCausalLM"),
    "T5": (t5, "T5ForConditionalGeneration", {}, "SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM"),
    "body": (llama, "LlamaModel", {}, None, "AutoPeftModel"),
    "masked": (bert, "BertForMaskedLM", {}, None, "AutoPeftModel"),
    "classes": (
        bert,
        "BertForSequenceClassification",
        {"modules_to_save": ["classifier"]},
        "SEQ_CLS",
        "AutoPeftModelForSequenceClassification",
    ),
    "scores": (
        llama,
        "LlamaForSequenceClassification",
        {"modules_to_save": ["score"]},
        "SEQ_CLS",
        "AutoPeftModelForSequenceClassification",
    ),
    "frozen classes": (bert, "BertForSequenceClassification", {}, None, "AutoPeftModel"),
    "tokens": (
        bert,
        "BertForTokenClassification",
        {"modules_to_save": ["classifier"]},
        "TOKEN_CLS",
        "AutoPeftModelForTokenClassification",
    ),
    "answers": (
        bert,
        "BertForQuestionAnswering",
        {"modules_to_save": ["qa_outputs"]},
        "QUESTION_ANS",
        "AutoPeftModelForQuestionAnswering",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CLASSES)
def test_pefts_auto_classes_find_base_and_adapter(case, tmp_path):
    make, kind, link, task, reader = CLASSES[case]
    make(kind).save_pretrained(tmp_path / "base")
    model = getattr(transformers, kind).from_pretrained(tmp_path / "base")
    chain = train(model, **link)
    chain.save(tmp_path / "chain")
    Chain.load(tmp_path / "chain").to_peft(tmp_path / "adapter")
    config = config_of(tmp_path / "adapter")
    assert config["task_type"] == task
    assert (config["auto_mapping"] is None) == (task is not None)
    adapted = getattr(peft, reader).from_pretrained(tmp_path / "adapter")
    assert (outputs(adapted) - outputs(model)).abs().max() <= 1e-4
    # a head that stays frozen passes a twentieth of a change on: its weights deviate by 0.02
    assert (outputs(make(kind)) - outputs(model)).abs().max() > 2e-4, "training changed nothing"


def test_a_model_of_ones_own_has_no_task(tmp_path):
    _, chain = fit(Net(), target_modules=["first"])
    chain.to_peft(tmp_path)
    config = config_of(tmp_path)
    assert config["task_type"] is None
    assert config["auto_mapping"] == {"base_model_class": "Net", "parent_library": "tests.models"}


def test_the_class_is_the_models_own_however_it_is_wrapped():
    model = tiny_opt()
    plain = Architecture.of(model)
    assert (plain.name, plain.model_type, plain.task) == ("OPTForCausalLM", "opt", "CAUSAL_LM")
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(r=2), lr=0.1)
    assert Architecture.of(model) == plain
    assert Architecture.of(torch.compile(model)) == plain
    opt.finish()
    assert Architecture.of(peft.get_peft_model(tiny_opt(), peft.LoraConfig(target_modules=["q_proj"]))) == plain
    linear = nn.Linear(2, 2)
    opt = ChainOptimizer(
        torch.optim.AdamW, nn.Sequential(linear), StepKnots(every=2), link=LinkConfig(r=1, target_modules=["0"])
    )
    assert Architecture.of(linear).name == "Linear"


# names


class Names(nn.Module):
    """Layers whose last names are, or are not, enough to tell them from others."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4), "act": nn.Tanh()})
        self.other = nn.ModuleDict({"v": nn.Linear(4, 4), "block": nn.ModuleDict({"k": nn.Linear(4, 4)})})
        self.block["k"] = nn.Linear(4, 4)
        self.quiet = nn.ModuleDict({"q": nn.Identity()})  # no tensors, and a name

    def forward(self, x):
        x = self.block["act"](self.block["v"](self.block["q"](self.quiet["q"](x))))
        return self.other["block"]["k"](self.other["v"](self.block["k"](x)))


def names():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Names()


INPUTS = torch.linspace(-1, 1, 20).view(5, 4)

#: layers, and the names that select them
SELECTIONS = {
    "plain names": (["block.v", "other.v"], ["v"]),
    "two plain names": (["block.v", "other.v", "block.k", "other.block.k"], ["v", "k"]),
    "a module without tensors has the name": (["block.q"], ["block.q"]),
    "one of two layers with the name": (["block.v"], ["block.v"]),
    "a path that ends another one": (["block.k"], r"block\.k"),
    "mixed with it": (["block.k", "block.v"], r"block\.v|block\.k"),
    "the longer of them": (["other.block.k"], ["other.block.k"]),
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_layers_are_listed_by_name_where_that_selects_them_alone(case, tmp_path):
    paths, expected = SELECTIONS[case]
    model = names()
    pattern = "|".join(path.replace(".", r"\.") for path in paths)
    opt = ChainOptimizer(
        torch.optim.AdamW, model, StepKnots(every=1), link=LinkConfig(r=1, target_modules=pattern), lr=0.05
    )
    for _ in range(2):
        model(INPUTS).square().mean().backward()
        opt.step()
        opt.zero_grad()
    opt.finish()
    opt.chain.to_peft(tmp_path)
    found = config_of(tmp_path)["target_modules"]
    assert (sorted(found) if isinstance(found, list) else found) == (
        sorted(expected) if isinstance(expected, list) else expected
    )
    adapted = peft.PeftModel.from_pretrained(names(), tmp_path)
    layers = {n.removesuffix(".lora_A") for n, _ in adapted.get_base_model().named_modules() if n.endswith(".lora_A")}
    assert layers == set(paths)
    assert close(adapted(INPUTS), model(INPUTS))


def test_more_paths_than_peft_condenses(tmp_path):
    """From 20 names on PEFT looks for shorter ones."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(30)))
    paths = [str(i) for i in range(0, 30) if i != 7]
    generator = torch.Generator().manual_seed(0)
    nested = nn.ModuleDict({"a": model, "b": nn.ModuleDict({"c": nn.Sequential(nn.Linear(3, 3))})})
    config = LinkConfig(r=1, target_modules="|".join(rf"a\.{path}" for path in paths))
    opt = ChainOptimizer(torch.optim.SGD, nested, StepKnots(every=1), link=config, lr=0.1)
    opt.tie()
    factors = {
        path: Factor(torch.randn(1, 3, generator=generator), torch.randn(3, 1, generator=generator), 1.0, "nearest")
        for path in opt.chain[0].factors
    }
    chain = Chain([Link(0, 0, factors, {}, KnotReport(0, 1, 1, 1.0, 0.0, None, 0.0))], base=opt.chain.base)
    opt.finish(merge=False)
    chain.to_peft(tmp_path)
    assert len(config_of(tmp_path)["target_modules"]) == 29
    adapted = peft.PeftModel.from_pretrained(nested, tmp_path).get_base_model()
    assert {n.removesuffix(".lora_A") for n, _ in adapted.named_modules() if n.endswith(".lora_A")} == set(factors)


def test_a_chain_without_a_base_uses_an_expression(tmp_path):
    """Nothing is known of the base's other modules."""
    _, chain = fit(Net(), target_modules=["first"])
    Chain(list(chain)).to_peft(tmp_path)
    assert config_of(tmp_path)["target_modules"] == "first"


class Head(nn.Module):
    def __init__(self, name, extra):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.add_module(name, extra)

    def forward(self, x):
        return self.head(self.body(x))


TROUBLE = {
    "another head": (
        lambda: Head("subhead", nn.Linear(4, 2)),
        ["body"],
        r"cannot hold module 'head': PEFT would look for 'subhead' too",
    ),
    "a layer in a module of the same name": (
        lambda: Head("tail", nn.ModuleDict({"head": nn.ModuleDict({"inner": nn.Linear(4, 4)})})),
        r"body|tail\.head\.inner",
        r"cannot hold layer 'tail\.head\.inner': PEFT adapts nothing in a module called 'head'",
    ),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_a_module_that_peft_would_look_for_elsewhere_is_refused(case, tmp_path):
    make, targets, message = TROUBLE[case]
    model = make()
    link = LinkConfig(r=1, target_modules=targets, modules_to_save=[r"head"] if case == "another head" else [])
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=1), link=link, lr=0.1)
    if case != "another head":  # the name is a whole path here, and the end of another one
        opt.add_param_group({"params": list(model.head.parameters())})
        for parameter in model.head.parameters():
            parameter.requires_grad_(True)
    for _ in range(2):
        model(INPUTS).square().mean().backward()
        opt.step()
        opt.zero_grad()
    opt.finish()
    with pytest.raises(ValueError, match=message):
        opt.chain.to_peft(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba"])
def test_layers_that_peft_refuses_carry_no_link(kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, use_mambapy=False
    )
    model = made(getattr(transformers, f"{kind}ForCausalLM"), config, 0)
    with pytest.raises(ValueError, match=r"'backbone\.layers\.0\.mixer\.out_proj' .* reads the weight without calling"):
        ChainOptimizer(
            torch.optim.AdamW, model, NeverKnots(), link=LinkConfig(r=1, target_modules=["out_proj"]), lr=0.1
        )
    link = LinkConfig(r=1, target_modules=["in_proj"])
    opt = ChainOptimizer(torch.optim.AdamW, model, NeverKnots(), link=link, lr=0.1)
    opt.tie()
    opt.chain.to_peft(tmp_path)


# ranks


def mixed(ranks):
    """A chain on a tiny OPT whose layers have these ranks in all, by name."""
    model = tiny_opt()
    modules = {path: m for path, m in model.named_modules() if path.rpartition(".")[2] in ranks}
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for path, module in modules.items():
        r = ranks[path.rpartition(".")[2]]
        A = torch.randn(r, module.in_features, generator=generator)
        factors[path] = Factor(A, torch.randn(module.out_features, r, generator=generator), 0.1, "nearest")
    link = LinkConfig(r=1, target_modules=list(ranks))
    opt = ChainOptimizer(torch.optim.SGD, model, StepKnots(every=1), link=link, lr=0.1)
    opt.tie()
    opt.finish(merge=False)
    report = KnotReport(0, 1, max(ranks.values()), 1.0, 0.0, None, 0.0)
    return Chain([Link(0, 0, factors, {}, report)], base=opt.chain.base)


@pytest.mark.parametrize("ranks", [{"q_proj": 3, "v_proj": 1}, {"q_proj": 1, "v_proj": 5, "fc1": 2}, {"q_proj": 4}])
def test_all_layers_get_one_rank_and_come_back_with_their_own(ranks, tmp_path):
    chain = mixed(ranks)
    chain.to_peft(tmp_path)
    config, most = config_of(tmp_path), max(ranks.values())
    assert (config["r"], config["lora_alpha"]) == (most, most)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    tensors, _ = tensorfile.load((tmp_path / "adapter_model.safetensors").read_bytes(), tmp_path)
    assert {t.shape[0 if "lora_A" in name else 1] for name, t in tensors.items()} == {most}
    account = json.loads((tmp_path / "export.json").read_text())
    assert {path.rpartition(".")[2]: rank for path, rank in account["ranks"].items()} == ranks
    back = Chain.from_peft(tmp_path)
    assert {path.rpartition(".")[2]: factor.rank for path, factor in back[0].factors.items()} == ranks
    merged = tiny_opt()
    chain.apply(merged)
    adapted = peft.PeftModel.from_pretrained(tiny_opt(), tmp_path)
    assert close(output(adapted), output(merged))
    twice = tmp_path / "again"
    back.to_peft(twice)
    assert close(output(peft.PeftModel.from_pretrained(tiny_opt(), twice)), output(merged))


def test_zeros_within_a_rank_and_an_untrained_adapter_stay(tmp_path):
    """Padding is a component whose row of A and column of B are both zero, at the end."""
    torch.manual_seed(0)
    A, B = torch.randn(4, 16), torch.zeros(16, 4)
    A[1], A[3] = 0, 0
    factor = Factor(A, B, 1.0, "nearest")
    chain = Chain([Link(0, 0, {"model.decoder.layers.0.fc1": factor}, {}, KnotReport(0, 1, 4, 1.0, 0.0, None, 0.0))])
    chain.to_peft(tmp_path)
    (back,) = Chain.from_peft(tmp_path)[0].factors.values()
    assert back.rank == 3
    nothing = Factor(torch.zeros(2, 16), torch.zeros(16, 2), 1.0, "nearest")
    Chain([Link(0, 0, {"fc1": nothing}, {}, chain[0].report)]).to_peft(tmp_path)
    (back,) = Chain.from_peft(tmp_path)[0].factors.values()
    assert back.rank == 1


def test_a_transposed_model_is_listed_by_name_too(tmp_path):
    merged, chain = fit(tiny_gpt2(), target_modules="all-linear")
    chain.to_peft(tmp_path)
    config = config_of(tmp_path)
    assert isinstance(config["target_modules"], list)
    assert config["fan_in_fan_out"]
    assert close(output(peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path)), output(merged))
