"""Rows of an embedding that are trained whole: in the model, in the record, in checkpoints and in PEFT's format."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cola import Chain, ChainOptimizer, LinkConfig, StepKnots
from cola.chain.on_disk import link_from_parts, link_to_parts
from cola.checkpoint.untied_link import read_untied_link
from cola.knot.tie import KnotError
from cola.lora.token_rows import with_rows
from tests.cola.chain.opt_chains import close
from tests.models import tiny_gpt2, tiny_opt

IDS = torch.arange(20).view(2, 10) % 10
ROWS = [5, 2]


class Scaled(nn.Embedding):
    """As in Gemma: its own forward scales what it looks up."""

    def forward(self, ids):
        return super().forward(ids) * 3


class Net(nn.Module):
    """An embedding, a body and a head that may share the embedding's weight."""

    def __init__(self, tied=False, embedding=nn.Embedding, dtype=torch.float32, size=10):
        super().__init__()
        self.embed, self.body, self.head = embedding(size, 4), nn.Linear(4, 4), nn.Linear(4, size)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 2)
        if tied:
            self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embed(ids))))


def chained(model, rows=None, **link):
    rows = {"embed": ROWS} if rows is None else rows
    link = {"r": 1, "target_modules": ["body"], "trainable_token_indices": rows, **link}
    return ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=LinkConfig(**link), lr=0.02)


def loss_of(model):
    return F.cross_entropy(model(IDS).flatten(0, 1).float(), IDS.roll(1).flatten())


def train(opt, model, steps):
    for _ in range(steps):
        loss_of(model).backward()
        opt.step()
        opt.zero_grad()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


#: models, and the names that are given for rows of them
MODELS = {
    "untied": ({}, ["embed"]),
    "tied": ({"tied": True}, ["embed"]),
    "both ends of a tied weight": ({"tied": True}, ["embed", "head"]),
    "the head": ({}, ["head"]),
    "embedding and head": ({}, ["embed", "head"]),
    "a scaled embedding": ({"embedding": Scaled, "tied": True}, ["embed"]),
    "bf16": ({"tied": True, "dtype": torch.bfloat16}, ["embed"]),
    "fp64": ({"dtype": torch.float64}, ["embed"]),
}


@pytest.fixture(params=MODELS)
def case(request):
    options, names = MODELS[request.param]
    return lambda: Net(**options), dict.fromkeys(names, ROWS)


def test_rows_have_the_gradient_of_the_whole_weight(case):
    make, rows = case
    model, plain = make(), make()
    chained(model, rows)
    # a head multiplies by the rows apart, which may sum four products in another order
    assert torch.allclose(model(IDS), plain(IDS), rtol=0, atol=16 * torch.finfo(model(IDS).dtype).eps)
    loss_of(model).backward()
    loss_of(plain).backward()
    for name in rows:
        layer = getattr(model, name)
        if not hasattr(layer, "trained_rows"):  # the head of a tied weight
            continue
        mine, whole = layer.trained_rows.grad, getattr(plain, name).weight.grad[sorted(ROWS)]
        # both are sums of up to 20 products; those of the plain model are rounded to its dtype
        eps = torch.finfo(whole.dtype).eps
        assert torch.allclose(mine, whole.to(mine.dtype), rtol=20 * eps, atol=20 * eps)
        assert layer._parameters["weight"].grad is None


def test_a_head_with_trained_rows_takes_no_inputs_too():
    rows = with_rows(torch.ones(3, 2), torch.tensor([1]), torch.zeros(1, 2))
    assert F.linear(torch.ones(2, 0, 2), rows).shape == (2, 0, 3)


def test_rows_follow_transforms():
    model = Net(tied=True)
    chained(model)
    loss_of(model).backward()
    rows = model.embed.trained_rows

    def loss(rows):
        logits = torch.func.functional_call(model, {"embed.trained_rows": rows}, (IDS,))
        return F.cross_entropy(logits.flatten(0, 1), IDS.roll(1).flatten())

    assert torch.allclose(torch.func.grad(loss)(rows.detach()), rows.grad)
    several = torch.func.vmap(loss)(torch.stack([rows.detach(), rows.detach() + 1]))
    assert torch.allclose(several[0], loss_of(model))


def test_rows_alone_move_and_the_record_gives_them_back(case, tmp_path):
    make, rows = case
    model, base = make(), make()
    keys, classes = list(base.state_dict()), [type(m) for m in base.modules()]
    opt = chained(model, rows)
    train(opt, model, 5)
    before = model(IDS).detach()
    with opt.merged() as merged:
        assert [type(m) for m in merged.modules()] == classes
        inside, kept = merged(IDS).detach(), state(merged)
    assert torch.equal(model(IDS), before), "training goes on as before"
    opt.finish()
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    assert same(state(model), kept)
    assert torch.equal(model(IDS), inside)
    # one sum in another order, and the rounding of the link's tie
    assert torch.allclose(inside, before, rtol=0, atol=64 * torch.finfo(before.dtype).eps)
    for name in ("embed", "head"):
        moved = (getattr(model, name).weight != getattr(base, name).weight).any(1).nonzero().flatten().tolist()
        tied = model.embed.weight is model.head.weight
        assert moved == (sorted(ROWS) if name in rows or tied else [])
    opt.chain.save(tmp_path)
    stored = Chain.load(tmp_path)
    carried = Chain()
    carried.load_state_dict(opt.chain.state_dict())
    for chain in (opt.chain, stored, carried):
        assert same(state(chain.apply(make())), state(model))
    half = make()
    stored.apply(half, upto=1)
    again = copy.deepcopy(model)
    stored.undo(again, make())
    stored.undo(again, make())
    assert same(state(again), state(half))


@pytest.mark.parametrize("how", ["directory", "state dict"])
def test_a_run_goes_on_bit_for_bit(case, how, tmp_path):
    make, rows = case
    model = make()
    opt = chained(model, rows)
    train(opt, model, 3)
    resumed = make()
    other = chained(resumed, rows)
    if how == "directory":
        opt.save(tmp_path)
        other.load(tmp_path)
    else:
        resumed.load_state_dict(state(model))
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for one, its in ((opt, model), (other, resumed)):
        train(one, its, 3)
        one.finish()
    assert same(state(model), state(resumed))
    assert same(state(opt.chain.apply(make())), state(other.chain.apply(make())))


def test_undo_on_a_running_chain_returns_to_the_recorded_rows():
    model = Net(tied=True, dtype=torch.bfloat16)
    opt = chained(model)
    train(opt, model, 2)
    at_knot = model.embed.trained_rows.detach().clone()
    train(opt, model, 2)
    opt.undo(Net(tied=True, dtype=torch.bfloat16))
    assert torch.equal(model.embed.trained_rows, at_knot), "the values as trained, not as rounded into the weight"
    opt.undo(Net(tied=True, dtype=torch.bfloat16))
    plain = Net(tied=True, dtype=torch.bfloat16)
    assert torch.equal(model.embed.trained_rows, plain.embed.weight[sorted(ROWS)].float())
    assert torch.equal(model.embed._parameters["weight"], plain.embed.weight)


def test_a_chain_is_followed_with_other_rows():
    model = Net()
    opt = chained(model)
    train(opt, model, 3)
    opt.finish()
    later = Net()
    following = chained(later, {"embed": [2, 7]})
    following.follow(opt.chain)
    assert torch.equal(later(IDS), model(IDS)), "the link is new, and the head has no rows of its own"
    train(following, later, 2)
    following.finish()
    assert same(state(following.chain.apply(Net())), state(later))


def test_the_live_link_of_a_checkpoint_has_its_rows(tmp_path):
    model = Net(tied=True)
    opt = chained(model)
    train(opt, model, 3)
    opt.save(tmp_path)
    untied = read_untied_link(tmp_path, Chain.load(tmp_path)).link
    opt.finish()
    last = opt.chain[-1]
    assert untied.trained.keys() == last.trained.keys() == set()
    assert untied.rows.keys() == last.rows.keys() == {"embed.weight", "head.weight"}
    for name, rows in last.rows.items():
        assert torch.equal(rows.values, untied.rows[name].values)
        assert torch.equal(rows.indices, untied.rows[name].indices)


def test_the_base_is_recognised_whatever_its_trained_rows_are():
    """New tokens are drawn anew whenever an embedding is resized."""
    model = Net(tied=True)
    opt = chained(model)
    train(opt, model, 3)
    opt.finish()
    anew, other = Net(tied=True), Net(tied=True)
    with torch.no_grad():
        anew.embed.weight[ROWS] += 1
        other.embed.weight[3] += 1
    assert same(state(opt.chain.apply(anew)), state(model))
    with pytest.raises(ValueError, match=r"wrong base: 'embed.weight' has other values"):
        opt.chain.apply(other)
    with pytest.raises(ValueError, match="wrong base"):
        opt.chain.apply(Net(size=11))
    with pytest.raises(ValueError, match=r"row 5 of 'embed.weight', 4 wide, which this model has as \(4, 4\)"):
        opt.chain.apply(Net(size=4), check=False)


def test_tied_and_untied_models_are_told_apart():
    model = Net()
    opt = chained(model, {"embed": ROWS, "head": ROWS})
    train(opt, model, 2)
    opt.finish()
    with pytest.raises(ValueError, match=r"rows of '\w+.weight' apart from those of '\w+.weight', .* one tensor"):
        opt.chain.apply(Net(tied=True), check=False)


def test_after_a_tie_the_weights_hold_the_rows():
    model = Net()
    opt = chained(model)
    train(opt, model, 1)
    opt.tie()
    assert torch.equal(model.state_dict()["embed.weight"][sorted(ROWS)], model.embed.trained_rows)


def test_copies_and_pickles_keep_the_rows():
    model = Net(tied=True)
    train(chained(model), model, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS), model(IDS))
        assert other.head.lender[0] is other.embed is not model.embed


def test_a_function_without_a_rule_reads_the_whole_weight(caplog):
    weight, indices = torch.arange(6.0).view(3, 2), torch.tensor([1])
    rows = torch.zeros(1, 2, requires_grad=True)
    with caplog.at_level(logging.WARNING, "cola"):
        found = torch.cumsum(with_rows(weight, indices, rows, "a table"), 0)
    assert found.tolist() == [[0, 1], [0, 1], [4, 6]]
    assert "a table is read by cumsum, which trained rows cannot follow" in caplog.text
    found.sum().backward()
    assert rows.grad.tolist() == [[2, 2]]
    x = torch.ones(2)
    cast = F.linear(x.double(), with_rows(weight, indices, rows).to(torch.float64))
    assert cast.tolist() == [1, 0, 9]


def test_all_leaves_out_a_layer_with_trained_rows(caplog):
    with caplog.at_level(logging.WARNING, "cola"):
        opt = chained(Net(), target_modules="all")
    assert [*opt.live.layers] == ["body", "head"]
    assert "target_modules='all' leaves out embed, whose rows trainable_token_indices trains" in caplog.text


REFUSED = {
    "no embedding by that name": ({"rows": {"embedding": [1]}}, "no module is called 'embedding'; embeddings here are"),
    "a list without an input embedding": ({"rows": [1]}, "a Net does not say which layer that is: give a dict"),
    "no embedding": ({"rows": {"": [1]}}, "layer '' is a Net: rows are trained of embeddings and output heads"),
    "outside": ({"rows": {"embed": [3, 10]}}, "'embed' has 10 rows, and 10 is not among them"),
    "a link on the same layer": ({"target_modules": ["embed"]}, "a layer has a link or trained rows"),
    "trained whole": ({"modules_to_save": ["embed"]}, "'embed' is trained whole by modules_to_save"),
    "one weight, other rows": (
        {"model": {"tied": True}, "rows": {"embed": [1], "head": [2]}}, "share one weight, and were given different",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_meant_is_refused(what):
    options, message = REFUSED[what]
    model = Net(**options.get("model", {}))
    before = state(model)
    link = {name: value for name, value in options.items() if name != "model"}
    with pytest.raises(ValueError, match=message):
        chained(model, **link)
    assert same(state(model), before)
    assert type(model.embed) is nn.Embedding


ODD = {
    "padding": ({"padding_idx": 2}, "never trains row 2, its padding_idx"),
    "norm": ({"max_norm": 1.0}, "has max_norm"),
    "frequency": ({"scale_grad_by_freq": True}, "has scale_grad_by_freq"),
}


@pytest.mark.parametrize("what", ODD)
def test_embeddings_of_another_kind_are_refused(what):
    options, message = ODD[what]
    model = Net()
    model.embed = nn.Embedding(10, 4, **options)
    with pytest.raises(ValueError, match=message):
        chained(model)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("all", "must be a list of token ids"),
        ({"embed": 3}, "must be a list of token ids"),
        ([], "must hold token ids, from 0"),
        ([-1], "must hold token ids, from 0"),
        ([1.5], "must hold token ids, from 0"),
        ([1, 1], "names a token twice"),
        ({}, r"trainable_token_indices=\{\} is empty"),
    ],
)
def test_token_ids_are_checked(rows, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LinkConfig(trainable_token_indices=rows)


def test_what_others_change_stops_the_run():
    model = Net()
    opt = chained(model)
    train(opt, model, 1)
    with torch.no_grad():
        model.embed.trained_rows[0, 0] = torch.inf
    with pytest.raises(KnotError, match="the trained rows of 'embed' have non-finite values"):
        opt.tie()
    model.embed.trained_rows.data.zero_()
    with pytest.raises(ValueError, match="or its trained rows"):
        opt.add_param_group({"params": [model.embed._parameters["weight"]]})
    rows, model.embed = model.embed, nn.Embedding(12, 4)
    with pytest.raises(KnotError, match="layer 'embed' has been replaced"):
        opt.tie()
    model.embed = rows
    opt.finish()


def test_a_checkpoint_with_other_rows_is_refused(tmp_path):
    model = Net()
    opt = chained(model)
    train(opt, model, 1)
    opt.save(tmp_path)
    with pytest.raises(ValueError, match=r"link differs \(trainable_token_indices: saved"):
        chained(Net(), {"embed": [1, 2]}).load(tmp_path)


@pytest.mark.parametrize("damage", ["lengths", "order", "dtype"])
def test_damaged_rows_are_noticed(damage):
    model = Net()
    opt = chained(model)
    train(opt, model, 1)
    opt.finish()
    tensors, about = link_to_parts(opt.chain[0])
    assert link_from_parts(tensors, about).rows.keys() == {"embed.weight"}
    indices = tensors["indices:embed.weight"]
    changes = {"lengths": indices[:1], "order": indices.flip(0), "dtype": indices.float()}
    with pytest.raises(ValueError, match=r"rows of 'embed.weight' do not fit"):
        link_from_parts({**tensors, "indices:embed.weight": changes[damage]}, about)


# PEFT

TOKENS = torch.arange(48).view(4, 12) * 7 % 32
#: models, and rows as PEFT takes them
EXPORTED = {
    "the input embedding": (lambda: tiny_opt(tie_word_embeddings=False), [7, 3]),
    "tied": (lambda: tiny_opt(tie_word_embeddings=True), [7, 3]),
    "by name": (tiny_gpt2, {"wte": [7, 3], "wpe": [0]}),
    "embedding and head": (lambda: tiny_opt(tie_word_embeddings=False), {"embed_tokens": [7, 3], "lm_head": [5]}),
}


def logits(model):
    return model.eval()(input_ids=TOKENS).logits


def tuned(model, opt, steps=3):
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        opt.step()
        opt.zero_grad()
    opt.finish()


@pytest.mark.parametrize("what", EXPORTED)
def test_peft_reads_the_rows_and_writes_them(what, tmp_path):
    peft = pytest.importorskip("peft")
    make, rows = EXPORTED[what]
    model = make()
    config = peft.LoraConfig(r=2, target_modules=r".*\.(q_proj|c_attn)", trainable_token_indices=rows)
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=config, lr=0.01)
    tuned(model, opt)
    opt.chain.to_peft(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    assert close(logits(theirs), logits(model))
    theirs.save_pretrained(tmp_path / "theirs")
    for directory in ("ours", "theirs"):
        assert close(logits(Chain.from_peft(tmp_path / directory).apply(make())), logits(model))


def test_rows_go_with_pefts_layers():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_opt(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    link = LinkConfig(trainable_token_indices=[7, 3])
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=link, lr=0.01)
    tuned(model, opt)
    assert close(logits(opt.chain.apply(tiny_opt())), logits(model))


def test_peft_would_confuse_layers_whose_paths_end_the_same(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "other_embed": nn.Embedding(10, 4), "body": nn.Linear(4, 4)})
    model.forward = lambda ids: model["body"](model["embed"](ids) + model["other_embed"](ids))
    opt = ChainOptimizer(
        torch.optim.AdamW, model, StepKnots(every=2),
        link=LinkConfig(r=1, target_modules=["body"], trainable_token_indices={"embed": [1]}), lr=0.01,
    )  # fmt: skip
    model(IDS).sum().backward()
    opt.step()
    opt.finish()
    with pytest.raises(ValueError, match="cannot hold rows of 'embed': PEFT would look for 'other_embed' too"):
        opt.chain.to_peft(tmp_path)
