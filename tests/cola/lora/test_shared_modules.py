"""A module that the model has at several places: the chain is right, and an adapter is right or refused by name."""

import pytest
import torch
from torch import nn

from cola import Chain, ChainOptimizer, LinkConfig, StepKnots
from tests.cola.chain.opt_chains import close

peft = pytest.importorskip("peft")


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.b(torch.tanh(self.a(x))))


class Listed(Twice):
    """One layer, three times in a list."""

    def __init__(self):
        super().__init__()
        self.b = nn.ModuleList([self.a] * 3)

    def forward(self, x):
        for layer in self.b:
            x = torch.tanh(layer(x))
        return self.head(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.inner(x))


class Blocks(nn.Module):
    """A shared block: its layer is registered once, in the block, so PEFT wraps it for all."""

    def __init__(self):
        super().__init__()
        block = Block()
        self.blocks = nn.ModuleList([block] * 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Heads(nn.Module):
    """A head under two names, beside a plain body."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.other = self.head

    def forward(self, x):
        return self.head(self.body(x)) + self.other(torch.tanh(self.body(x)))


class Nested(Blocks):
    """A shared block of which one layer has a second name elsewhere."""

    def __init__(self):
        super().__init__()
        self.again = self.blocks[0].inner

    def forward(self, x):
        return super().forward(self.again(x))


def made(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind()


def inputs():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def trained(kind, **link):
    model = made(kind)
    config = LinkConfig(**{"r": 1, "target_modules": "all-linear", **link})
    opt = ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=2), link=config, lr=0.05)
    for _ in range(4):
        (model(inputs()) - 1).square().mean().backward()
        opt.step()
        opt.zero_grad()
    opt.finish()
    return model, opt.chain


CASES = {
    "two names": (Twice, {}, "a", "b"),
    "a list": (Listed, {}, "a", "b.0"),
    "a layer of a shared block": (Nested, {}, r"blocks\.0\.inner", "again"),
    "a module that is trained whole": (
        Heads,
        {"target_modules": ["body"], "modules_to_save": ["head"]},
        "head",
        "other",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_module_at_several_places_is_refused_by_name(case, tmp_path):
    kind, link, name, other = CASES[case]
    model, chain = trained(kind, **link)
    fresh = made(kind)
    chain.apply(fresh)
    assert close(fresh(inputs()), model(inputs())), "the chain itself is right"
    chain.save(tmp_path / "chain")
    beside = Chain()
    beside.load_state_dict(chain.state_dict())
    for one in (chain, Chain.load(tmp_path / "chain"), beside):
        with pytest.raises(
            ValueError, match=f"cannot hold '{name}': the model has this module at .*'{other}'.* merged"
        ):
            one.to_peft(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_shared_block_is_exported(tmp_path):
    model, chain = trained(Blocks)
    chain.to_peft(tmp_path)
    adapted = peft.PeftModel.from_pretrained(made(Blocks), tmp_path)
    assert close(adapted(inputs()), model(inputs()))


@pytest.mark.parametrize("kind", [Twice, Listed])
def test_a_shared_module_that_is_not_adapted_does_not_matter(kind, tmp_path):
    model, chain = trained(kind, target_modules=["head"])
    chain.to_peft(tmp_path)
    adapted = peft.PeftModel.from_pretrained(made(kind), tmp_path)
    assert close(adapted(inputs()), model(inputs()))


@pytest.mark.parametrize(("kind", "other"), [(Twice, "b"), (Listed, "b.0"), (Nested, "again")])
def test_pefts_layer_with_a_base_that_is_reachable_unwrapped_is_refused(kind, other):
    model = made(kind)
    target = "inner" if kind is Nested else "a"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=[target]))
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    with pytest.raises(ValueError, match=rf"base layer at '[\w.]*{other}' as well, where PEFT has not wrapped it"):
        ChainOptimizer(torch.optim.AdamW, wrapped, StepKnots(every=2), lr=0.05)
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())


def test_pefts_layer_in_a_shared_block_carries_a_chain(tmp_path):
    model = made(Blocks)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["inner"]))
    opt = ChainOptimizer(torch.optim.AdamW, wrapped, StepKnots(every=1), lr=0.05)
    for _ in range(2):
        (wrapped(inputs()) - 1).square().mean().backward()
        opt.step()
        opt.zero_grad()
    opt.finish()
    opt.chain.to_peft(tmp_path)
    adapted = peft.PeftModel.from_pretrained(made(Blocks), tmp_path)
    assert close(adapted(inputs()), wrapped(inputs()))


@pytest.mark.parametrize("link", [{"target_modules": ["b"]}, {"target_modules": ["head"], "modules_to_save": ["b"]}])
def test_another_name_of_a_module_is_refused_with_the_one_to_use(link):
    with pytest.raises(ValueError, match=r"'b' is another name of the module 'a': use that one"):
        ChainOptimizer(torch.optim.SGD, Twice(), StepKnots(every=1), link=LinkConfig(r=1, **link), lr=0.1)
