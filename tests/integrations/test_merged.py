"""`with opt.merged()` on quantised layers, PEFT's layers, compiled, distributed and sharded models."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cola import ChainOptimizer, LinkConfig, StepKnots
from tests.models import BODY, Net, loss_of, tiny_opt, train


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two):
    return list(one) == list(two) and all(torch.equal(a, b) for a, b in zip(one.values(), two.values()))


@pytest.mark.parametrize("steps", [0, 2, 5])
@pytest.mark.parametrize("how", ["stack", "requantize"])
@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_quantised_layers(kind, how, steps):
    nets = pytest.importorskip("tests.integrations.quantized_nets")
    opt = nets.chained(nets.net(kind), quantized=how)
    nets.train(opt, opt.model, steps)
    opt.zero_grad()
    twin, finished = copy.deepcopy(opt), copy.deepcopy(opt)
    finished.finish()
    with opt.merged() as model:
        assert [type(m) for m in model.modules()] == [type(m) for m in finished.model.modules()]
        assert nets.same(model, finished.model)
        kept, inside = model.state_dict(), states(model)
        with torch.no_grad():
            model.eval()(nets.inputs(0))
    assert same(kept, inside)
    assert nets.same(opt.model, twin.model)
    assert nets.train(opt, opt.model, 5, start=steps) == nets.train(twin, twin.model, 5, start=steps)
    opt.finish(), twin.finish()
    assert nets.same(opt.model, twin.model)


IDS = torch.arange(48).view(4, 12) * 7 % 32


def peft_run(**changes):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = peft.get_peft_model(tiny_opt(), config)
    return ChainOptimizer(torch.optim.AdamW, model, StepKnots(every=3), lr=0.05)


def peft_steps(opt, numbers):
    for number in numbers:
        opt.zero_grad()
        opt.model(input_ids=IDS.roll(number, 1), labels=IDS.roll(number, 1)).loss.backward()
        opt.step()


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize(
    "changes", [{}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"v_proj": 2}}], ids=["plain", "head", "pattern"]
)
def test_pefts_layers_stay_with_a_link_of_zeros_and_can_be_unloaded(changes, steps, tmp_path, caplog):
    opt = peft_run(**changes)
    peft_steps(opt, range(steps))
    twin, finished = copy.deepcopy(opt), copy.deepcopy(opt)
    finished.finish()
    assert [r.levelname for r in caplog.records if "PEFT's layers stay" in r.getMessage()] == ["WARNING"]
    caplog.clear()
    with opt.merged() as model:
        assert "PEFT's layers stay" not in caplog.text
        assert same(states(model), states(finished.model))
        model.save_pretrained(tmp_path / "adapter")
        model.save_pretrained(tmp_path / "adapter")
        (said,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("save_pretrained()")]
        assert "writes an adapter of zeros here" in said
        plain = model.unload()
        assert same(states(plain), states(finished.model.unload()))
        plain.save_pretrained(tmp_path)
    assert same(states(opt.model), states(twin.model))
    assert [type(m) for m in opt.model.modules()] == [type(m) for m in twin.model.modules()]
    for one in (opt, twin):
        peft_steps(one, range(steps, steps + 4))
    assert same(states(opt.model), states(twin.model))
    merged = tiny_opt()
    merged.load_state_dict(type(merged).from_pretrained(tmp_path).state_dict())


#: what a user may do in the block to a PEFT model
PEFT_CALLS = {
    "unload": lambda model: model.unload(),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_adapter": lambda model: model.merge_adapter(),
    "disable_adapter_layers": lambda model: model.base_model.disable_adapter_layers(),
    "delete_adapter": lambda model: model.delete_adapter("default"),
    "set_adapter": lambda model: (
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"])),
        model.set_adapter("other"),
    ),
}


def peft_settings(model):
    """What PEFT notes on its modules, as text."""
    kinds, tables = (bool, int, float, str, list, dict, type(None)), vars(nn.Module()).keys() - {"training"}
    return [
        {name: as_text(value) for name, value in vars(m).items() if isinstance(value, kinds) and name not in tables}
        for m in model.modules()
    ]


def as_text(value):
    """Its repr, with sets in order: a copy of a set may list its members otherwise."""
    if hasattr(value, "to_dict"):
        return as_text(value.to_dict())
    if isinstance(value, dict):
        return repr({name: as_text(item) for name, item in value.items()})
    return repr(sorted(value) if isinstance(value, set) else value)


@pytest.mark.parametrize("call", PEFT_CALLS)
def test_what_a_call_of_peft_does_in_the_block_is_undone(call):
    opt = peft_run(modules_to_save=["lm_head"])
    peft_steps(opt, range(4))
    twin = copy.deepcopy(opt)
    with torch.random.fork_rng(devices=[]), opt.merged() as model:
        PEFT_CALLS[call](model)
    assert peft_settings(opt.model) == peft_settings(twin.model)
    assert same(states(opt.model), states(twin.model))
    assert [p.requires_grad for p in opt.model.parameters()] == [p.requires_grad for p in twin.model.parameters()]
    for one in (opt, twin):
        peft_steps(one, range(4, 8))
        one.finish()
    assert same(states(opt.model), states(twin.model))


@pytest.fixture
def group():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made():
    link = LinkConfig(r=2, lora_alpha=2, target_modules=BODY, bias="lora_only")
    return ChainOptimizer(torch.optim.AdamW, Net(), StepKnots(every=3), link=link, lr=0.02)


@pytest.mark.parametrize("how", ["ddp", "compiled"])
def test_a_wrapped_model_trains_on(how, group):
    def wrap(model):
        if how == "ddp":
            return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        return torch.compile(model, backend="eager")

    opt, twin = made(), made()
    called, other = wrap(opt.model), wrap(twin.model)
    for one, model in ((opt, called), (twin, other)):
        train(one, model, 5)
    finished = made()
    train(finished, finished.model, 5)
    finished.finish()
    with opt.merged() as model, torch.no_grad():
        assert same(states(model), states(finished.model))
        assert torch.equal(loss_of(model, 0), loss_of(called, 0))
        assert torch.equal(loss_of(model, 0), loss_of(finished.model, 0))
    assert train(opt, called, 4, start=5) == train(twin, other, 4, start=5)
    assert same(states(opt.model), states(twin.model))


def test_a_sharded_model_is_refused_before_anything_changes(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    opt, twin = made(), made()
    for one in (opt, twin):
        fully_shard(one.model, mesh=init_device_mesh("cpu", (1,)))
        train(one, one.model, 2)
    with pytest.raises(RuntimeError, match=r"in one piece.*FSDP2.*its forward includes the live link"), opt.merged():
        pass
    assert train(opt, opt.model, 3, start=2) == train(twin, twin.model, 3, start=2)
